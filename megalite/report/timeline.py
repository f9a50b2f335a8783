"""When each rank computes in a step, and how long it waits: as planned, and as recorded."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from megalite.pipeline.orders import RULES
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import Durations, Interval, bubble_fraction, idle, play
from megalite.report.chart import Bar, bar_chart
from megalite.report.content import Chart, Note, Section, Table
from megalite.report.run import Run
from megalite.report.trace import Span, Trace

WORDS = {
    "Forward": "forward",
    "Backward": "backward",
    "BackwardInput": "input gradient",
    "BackwardWeight": "weight gradient",
}
PARTS = {
    "Forward": "forward",
    "BackwardInput": "backward_input",
    "BackwardWeight": "backward_weight",
}
MOST_BARS = 3000  # of a chart: the longest are drawn
COMPUTE = "compute"


def timeline(runs: Sequence[Run]) -> Section:
    """For each run its plan, and its recording."""
    section = Section("Timeline of a step")
    for run in runs:
        section.items += _planned(run)
        section.items += _recorded(run)
    return section


def _planned(run: Run) -> Iterator[Note | Chart]:
    """The schedule if a forward and both parts of a backward took equally long, and transfers no time."""
    if run.config is None or run.config.parallel.pp_size == 1:
        why = (
            "its pipeline is not known"
            if run.config is None
            else "one pipeline stage, so none waits for another"
        )
        yield Note(f"{run.name}: {why}.")
        return
    parallel, num_micro_batches = run.config.parallel, run.num_micro_batches
    if num_micro_batches is None or parallel.pipeline_schedule not in RULES:
        yield Note(f"{run.name}: the micro batches of a step are not known before its first checkpoint.")
        return
    order = orders_of(parallel.pipeline_schedule, parallel.pp_size, num_micro_batches, parallel.num_chunks)
    intervals = play(*order)
    waiting = f"ranks wait {bubble_fraction(intervals):.1%} of the time"
    title = f"Planned: {run.name}, {parallel.pipeline_schedule}, {num_micro_batches} micro batches; {waiting}"
    description = f"The planned timeline of {parallel.pp_size} pipeline ranks; {waiting}."
    bars = [_planned_bar(interval) for interval in intervals]
    kinds = [kind for kind in WORDS.values() if any(bar.kind == kind for bar in bars)]
    yield bar_chart(title, "time, one forward = 1", _longest(bars), description, kinds)


def _planned_bar(interval: Interval) -> Bar:
    kind = WORDS[type(interval.action).__name__]
    chunk = f", chunk {interval.action.chunk}" if interval.action.chunk else ""
    text = f"{kind} of micro batch {interval.action.micro_batch}{chunk}"
    return Bar(f"stage rank {interval.rank}", interval.start, interval.end, kind, text)


def _recorded(run: Run) -> Iterator[Note | Chart | Table]:
    """Of each rank what it did, and what it waited for."""
    if not run.traces:
        yield Note(f"{run.name}: no timeline was recorded (timeline-rank*.json).")
        return
    facts = run.traces[0].facts
    step = f" of step {facts['step']:,}" if "step" in facts else ""
    begin = min(span.begin_seconds for trace in run.traces for span in trace.spans)
    bars = [_recorded_bar(span, begin) for trace in run.traces for span in trace.spans]
    kinds = list(dict.fromkeys([*WORDS.values(), *(bar.kind for bar in bars)]))
    kinds = [kind for kind in kinds if any(bar.kind == kind for bar in bars)]
    title = f"Recorded: {run.name}{step}"
    description = f"What {len(run.traces)} ranks did{step}, in seconds; the waits are in the table below."
    yield bar_chart(title, "seconds", _longest(bars), description, kinds)
    if len(bars) > MOST_BARS:
        yield Note(f"{run.name}: of {len(bars):,} recorded spans the {MOST_BARS:,} longest are drawn.")
    pipelines = _pipelines(run.traces)
    rows = [row for pipeline in pipelines for row in _waits(pipeline)]
    headings = ("", "computes, s", "waits, s", "waits, share", "planned share")
    yield Table(f"Waiting of each rank of {run.name}{step}", headings, rows)
    yield Note(
        "A rank waits between the first computation of its pipeline and the last, whenever it computes "
        "nothing. The plan has each kind of computation take what it took in the mean, and transfers no time."
    )


def _recorded_bar(span: Span, begin: float) -> Bar:
    row = f"rank {span.rank}" if span.lane == COMPUTE else f"rank {span.rank} {span.lane}"
    times = span.begin_seconds - begin, span.end_seconds - begin
    return Bar(row, *times, span.kind, f"{span.name}: {span.seconds:.4g} s")


def _longest(bars: Sequence[Bar]) -> list[Bar]:
    """In their order, line by line; what is left out is the shortest."""
    kept = set(sorted(bars, key=lambda bar: bar.begin - bar.end)[:MOST_BARS])
    return sorted((bar for bar in bars if bar in kept), key=lambda bar: _natural(bar.row))


def _natural(row: str) -> tuple[Any, ...]:
    """Rank 10 comes after rank 9, and a rank's lanes beneath it."""
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else part) for part in row.split())


def _pipelines(traces: Sequence[Trace]) -> list[list[Trace]]:
    """The ranks that hold one model together, first stage first; all as one where the files do not say."""
    places = [(t.facts.get("pipeline", 0), t.facts.get("pp_rank", t.spans[0].rank), t) for t in traces]
    ordered = sorted(places, key=lambda place: place[:2])
    return [[trace for *_, trace in group] for _, group in groupby(ordered, key=lambda place: place[0])]


def _waits(pipeline: Sequence[Trace]) -> Iterator[tuple[str, ...]]:
    """A row for each rank."""
    computed = [[span for span in trace.spans if span.lane == COMPUTE] for trace in pipeline]
    spans = [span for of_rank in computed for span in of_rank]
    if not spans:
        return
    whole = max(span.end_seconds for span in spans) - min(span.begin_seconds for span in spans)
    planned = _planned_shares(pipeline[0].facts, spans)
    for number, (trace, of_rank) in enumerate(zip(pipeline, computed, strict=True)):
        busy = sum(span.seconds for span in of_rank)
        share = planned[number] if planned else None
        cells = f"{busy:.4f}", f"{whole - busy:.4f}", f"{(whole - busy) / whole:.1%}"
        yield f"rank {trace.spans[0].rank}", *cells, "-" if share is None else f"{share:.1%}"


def _planned_shares(facts: Mapping[str, Any], spans: Sequence[Span]) -> list[float]:
    """Of the time, in which each rank of a pipeline waits by plan; none where the files do not say enough."""
    names = ("pipeline_schedule", "pp_size", "num_micro_batches", "num_chunks")
    if any(name not in facts for name in names) or facts["pipeline_schedule"] not in RULES:
        return []
    orders, placement = orders_of(*(facts[name] for name in names))
    intervals = play(orders, placement, _mean_durations(spans, placement.num_chunks))
    end = max(interval.end for interval in intervals)
    return [idle(intervals, rank) / end for rank in range(placement.num_ranks)]


def _mean_durations(spans: Sequence[Span], num_chunks: int) -> Durations:
    """Of one micro batch through all chunks. A backward that is whole is given as two halves."""
    means: dict[str, float] = {}
    for action in WORDS:
        seconds = [span.seconds for span in spans if span.detail.get("action") == action]
        if seconds and action == "Backward":
            half = fmean(seconds) * num_chunks / 2
            means |= {"backward_input": half, "backward_weight": half}
        elif seconds:
            means[PARTS[action]] = fmean(seconds) * num_chunks
    return Durations(**means)
