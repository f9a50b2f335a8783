"""Throughput and MFU, with the formula that they are computed by."""

from collections.abc import Sequence
from statistics import median

from megalite.model.flops import FLOPS_FORMULA, flops_per_token, forward_flops_per_token
from megalite.report.chart import Series, line_chart
from megalite.report.content import Chart, Note, Section, Table
from megalite.report.curve import points_of
from megalite.report.run import Run
from megalite.report.text import number

SPEEDS = (
    ("Throughput", "tokens_per_second", "tokens per second", "~s"),
    ("MFU", "mfu", "share of the peak", "~%"),
)


def speed(runs: Sequence[Run]) -> Section:
    """Curves, means over the whole run, and how they came to be."""
    charts: list[Chart] = []
    for title, name, unit, form in SPEEDS:
        series = [Series(run.name, points_of(run.rows, name)) for run in runs]
        drawn = [one for one in series if one.points]
        charts += [line_chart(title, unit, drawn, zero=True, number_format=form)] if drawn else []
    table = Table(
        "Speed over all recorded steps",
        ("", *(run.name for run in runs)),
        [
            ("tokens per second", *(number(_mean(run, "tokens_per_second"), ",.0f") for run in runs)),
            ("MFU", *(number(_mean(run, "mfu"), ".2%") for run in runs)),
            ("median step, seconds", *(number(_median_step(run)) for run in runs)),
            ("slowest step, seconds", *(number(max(_seconds(run), default=None)) for run in runs)),
            ("FLOPs per token", *(number(_flops_per_token(run), ",") for run in runs)),
            ("peak of all devices, FLOP/s", *(number(_peak(run), ".4g") for run in runs)),
        ],
    )
    formula = Note(
        "MFU = tokens per second x FLOPs per token / peak FLOP/s of all devices (PaLM, arXiv 2204.02311, "
        f"appendix B). FLOPs per token = {FLOPS_FORMULA}. The peak is what a step's throughput and MFU say "
        "of it. A mean is over the time of steps; validation, saves and evaluation lie between them."
    )
    return Section("Speed", [*charts, table, formula])


def _seconds(run: Run) -> list[float]:
    return [row["step_seconds"] for row in run.rows if row.get("step_seconds")]


def _median_step(run: Run) -> float | None:
    return median(_seconds(run)) if _seconds(run) else None


def _mean(run: Run, name: str) -> float | None:
    """Of a rate, over the time of steps."""
    timed = [
        (row[name], row["step_seconds"]) for row in run.rows if row.get(name) and row.get("step_seconds")
    ]
    seconds = sum(time for _, time in timed)
    return sum(rate * time for rate, time in timed) / seconds if seconds else None


def _flops_per_token(run: Run) -> int | None:
    """As the run counts them: KTO's mismatched rows, as many, go forward only."""
    if run.config is None:
        return None
    work = (run.config.model, run.config.data.seq_length, run.config.lora)
    more = forward_flops_per_token(*work) if run.config.has_mismatched_rows else 0
    return flops_per_token(*work) + more


def _peak(run: Run) -> float | None:
    """Which the folder does not state: what the last step's numbers divide to."""
    flops, row = _flops_per_token(run), run.rows[-1]
    if flops is None or not row.get("mfu") or not row.get("tokens_per_second"):
        return None
    return row["tokens_per_second"] * flops / row["mfu"]
