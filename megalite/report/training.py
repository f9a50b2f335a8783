"""Loss, validation, norms and rates; and each run in a few numbers."""

from collections.abc import Callable, Sequence
from functools import partial

from megalite.measure.progress import seconds_in_words
from megalite.model.flops import num_active_parameters, num_adapter_parameters, num_parameters
from megalite.report.chart import Series, line_chart
from megalite.report.content import Chart, Note, Section, Table
from megalite.report.curve import MOST_POINTS, last, points_of
from megalite.report.events import marks_of
from megalite.report.run import Run
from megalite.report.text import at_step, number

VALIDATION = "validation_"


def overview(runs: Sequence[Run]) -> Section:
    """What a reader wants to know first, a column for each run."""
    table = Table(
        "Each run in numbers",
        ("", *(run.name for run in runs)),
        [(name, *(tell(run) for run in runs)) for name, tell in FACTS.items()],
    )
    lacking = [Note(f"{run.name}: {line}") for run in runs for line in run.missing]
    return Section("Overview", [table, *lacking])


def training(runs: Sequence[Run]) -> Section:
    """The curves of training."""
    unit = "nats per pair" if any("rewards/margins" in run.rows[-1] for run in runs) else "nats per token"
    marks = marks_of(runs[0]) if len(runs) == 1 else None
    curves = [series for run in runs for series in (_series(run, "loss"), _validated(run, "loss"))]
    charts = [line_chart("Loss", unit, [one for one in curves if one.points], marks=marks)]
    charts += [
        chart
        for title, name, unit, form in (
            ("Gradient norm, before clipping", "grad_norm", "norm", "~s"),
            ("Learning rate", "learning_rate", "rate", "~e"),
            ("Auxiliary loss of the experts", "auxiliary_loss", "nats per token", "~s"),
        )
        for chart in _chart(runs, title, name, unit, form)
    ]
    charts += _rewards(runs)
    notes = [Note(f"{run.name}: no validation was recorded.") for run in runs if not _is_validated(run)]
    if marks:
        notes.append(Note("Upright lines in the chart of the loss are events, told of below."))
    thinned = [run.name for run in runs if len(run.rows) > MOST_POINTS]
    if thinned:
        notes.append(
            Note(
                f"{', '.join(thinned)}: more than {MOST_POINTS} steps, so a point is the mean of its "
                "neighbours, and a band reaches from the least to the largest of them."
            )
        )
    return Section("Training", [*charts, *notes])


def _rewards(runs: Sequence[Run]) -> list[Chart]:
    """Of runs on pairs of answers."""
    rewards = [_series(run, f"rewards/{name}", name) for run in runs for name in ("chosen", "rejected")]
    shares = [_series(run, "rewards/accuracies") for run in runs]
    shares += [_validated(run, "rewards/accuracies") for run in runs]
    share_title = "Share of pairs whose chosen answer has the larger reward"
    charts = ((rewards, "Reward of each answer", "reward"), (shares, share_title, "share"))
    drawn = [([one for one in series if one.points], title, unit) for series, title, unit in charts]
    return [line_chart(title, unit, series) for series, title, unit in drawn if series]


def _chart(runs: Sequence[Run], title: str, name: str, unit: str, form: str) -> list[Chart]:
    """A curve for each run that has one; no chart where none has."""
    series = [one for one in (_series(run, name) for run in runs) if one.points]
    return [line_chart(title, unit, series, zero=True, number_format=form)] if series else []


def _series(run: Run, name: str, curve: str = "training") -> Series:
    return Series(run.name, points_of(run.rows, name), curve)


def _validated(run: Run, name: str) -> Series:
    return Series(run.name, points_of(run.rows, VALIDATION + name), "validation", dotted=True)


def _is_validated(run: Run) -> bool:
    return any("validation_loss" in row for row in run.rows)


def _steps(run: Run) -> str:
    planned = f" of {run.config.schedule.num_steps:,}" if run.config else ""
    return f"{run.rows[-1]['step']:,}{planned}"


def _best(run: Run, name: str) -> str:
    found = [(row[name], row["step"]) for row in run.rows if row.get(name) is not None]
    return at_step((min(found)[1], min(found)[0]) if found else None)


def _parameters(run: Run) -> str:
    if run.config is None:
        return "-"
    model, lora = run.config.model, run.config.lora
    active = f", {num_active_parameters(model):,} active per token" if model.n_routed_experts else ""
    trained = f", frozen; {num_adapter_parameters(model, lora):,} in adapters" if lora.rank else ""
    return f"{num_parameters(model):,}{active}{trained}"


def _layout(run: Run) -> str:
    if run.config is None:
        return "-"
    sizes = run.config.parallel
    axes = {"tensor": sizes.tp_size, "pipeline": sizes.pp_size, "context": sizes.cp_size, "data": run.dp_size}
    told = " x ".join(f"{name} {'?' if size is None else size}" for name, size in axes.items() if size != 1)
    experts = f", experts over {sizes.ep_size}" if sizes.ep_size > 1 else ""
    ranks = "" if run.num_ranks is None else f"{run.num_ranks} ranks = "
    return f"{ranks}{told or 'one process'}{experts}"


def _numbers(run: Run) -> str:
    return f"ZeRO-{run.deepspeed.zero_stage}, {run.deepspeed.precision}" if run.deepspeed else "-"


def _batch(run: Run) -> str:
    if run.deepspeed is None or run.config is None:
        return "-"
    samples = run.deepspeed.train_batch_size
    return f"{samples:,} samples, {samples * run.config.tokens_per_sample:,} tokens"


def _seconds(run: Run) -> str:
    return seconds_in_words(sum(row["step_seconds"] for row in run.rows if row.get("step_seconds")))


def _tokens(run: Run) -> str:
    found = last(run.rows, "consumed_tokens")
    return number(found and found[1], ",")


FACTS: dict[str, Callable[[Run], str]] = {
    "folder": lambda run: str(run.folder),
    "parameters": _parameters,
    "layout": _layout,
    "ZeRO and numbers": _numbers,
    "batch of a step": _batch,
    "steps taken": _steps,
    "tokens consumed": _tokens,
    "time in steps": _seconds,
    "last loss": lambda run: at_step(last(run.rows, "loss")),
    "last validation loss": lambda run: at_step(last(run.rows, "validation_loss")),
    "best validation loss": partial(_best, name="validation_loss"),
}
