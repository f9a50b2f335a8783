"""When each rank computes in a step, and how long it waits: as planned, and as recorded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalite.measure.timeline import RankTimeline, Span, pipelines_of
from megalite.pipeline.actions import WORDS, computation_of
from megalite.pipeline.orders import RULES
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import Interval, bubble_fraction, idle, mean_durations, play
from megalite.report.chart import Bar, bar_chart
from megalite.report.content import Chart, Note, Section, Table
from megalite.report.run import Run

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
    kind = WORDS[type(interval.action)]
    chunk = f", chunk {interval.action.chunk}" if interval.action.chunk else ""
    text = f"{kind} of micro batch {interval.action.micro_batch}{chunk}"
    return Bar(f"stage rank {interval.rank}", interval.start, interval.end, kind, text)


def _recorded(run: Run) -> Iterator[Note | Chart | Table]:
    """Of each rank what it did, and what it waited for."""
    if not run.timelines:
        yield Note(f"{run.name}: no timeline was recorded (timeline-rank*.json).")
        return
    facts = run.timelines[0].facts
    step = f" of step {facts['step']:,}" if "step" in facts else ""
    spans = [(recorded.rank, span) for recorded in run.timelines for span in recorded.spans]
    begin = min(span.begin_seconds for _, span in spans)
    bars = [_recorded_bar(rank, span, begin) for rank, span in spans]
    kinds = list(dict.fromkeys([*WORDS.values(), *(bar.kind for bar in bars)]))
    kinds = [kind for kind in kinds if any(bar.kind == kind for bar in bars)]
    title = f"Recorded: {run.name}{step}"
    description = f"What {len(run.timelines)} ranks did{step}, in seconds; the waits are in the table below."
    yield bar_chart(title, "seconds", _longest(bars), description, kinds)
    if len(bars) > MOST_BARS:
        yield Note(f"{run.name}: of {len(bars):,} recorded spans the {MOST_BARS:,} longest are drawn.")
    rows = [row for pipeline in pipelines_of(run.timelines) for row in _waits(pipeline)]
    headings = ("", "computes, s", "waits, s", "waits, share", "planned share")
    yield Table(f"Waiting of each rank of {run.name}{step}", headings, rows)
    yield Note(
        "A rank waits between the first computation of its pipeline and the last, whenever it computes "
        "nothing. The plan has each kind of computation take what it took in the mean, and transfers no time."
    )


def _recorded_bar(rank: int, span: Span, begin: float) -> Bar:
    """A computation's kind is its name without the number of the micro batch."""
    computes = span.lane == COMPUTE
    row = f"rank {rank}" if computes else f"rank {rank} {span.lane}"
    kind = span.name.rstrip("0123456789 ") if computes else span.lane
    times = span.begin_seconds - begin, span.end_seconds - begin
    return Bar(row, *times, kind, f"{span.name}: {span.seconds:.4g} s")


def _longest(bars: Sequence[Bar]) -> list[Bar]:
    """In their order, line by line; what is left out is the shortest."""
    kept = set(sorted(bars, key=lambda bar: bar.begin - bar.end)[:MOST_BARS])
    return sorted((bar for bar in bars if bar in kept), key=lambda bar: _natural(bar.row))


def _natural(row: str) -> tuple[Any, ...]:
    """Rank 10 comes after rank 9, and a rank's lanes beneath it."""
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else part) for part in row.split())


def _waits(pipeline: Sequence[RankTimeline]) -> Iterator[tuple[str, ...]]:
    """A row for each rank."""
    computed = [recorded.lane(COMPUTE) for recorded in pipeline]
    spans = [span for of_rank in computed for span in of_rank]
    whole = max((s.end_seconds for s in spans), default=0) - min((s.begin_seconds for s in spans), default=0)
    if not whole:
        return
    planned = _planned_shares(pipeline[0].facts, spans)
    for recorded, of_rank in zip(pipeline, computed, strict=True):
        busy = sum(span.seconds for span in of_rank)
        share = planned.get(recorded.facts.get("pp_rank"))
        cells = f"{busy:.4f}", f"{whole - busy:.4f}", f"{(whole - busy) / whole:.1%}"
        yield f"rank {recorded.rank}", *cells, "-" if share is None else f"{share:.1%}"


def _planned_shares(facts: Mapping[str, Any], spans: Sequence[Span]) -> dict[int | None, float]:
    """Of the time, in which each rank of a pipeline waits by plan; none where the files do not say enough."""
    names = ("pipeline_schedule", "pp_size", "num_micro_batches", "num_chunks")
    computed = [
        Interval(span.begin_seconds, span.end_seconds, 0, action)  # of any rank: a mean is taken over all
        for span in spans
        if (action := computation_of(span.detail))
    ]
    if not computed or any(name not in facts for name in names) or facts["pipeline_schedule"] not in RULES:
        return {}
    orders, placement = orders_of(*(facts[name] for name in names))
    intervals = play(orders, placement, mean_durations(computed, placement.num_chunks))
    end = max(interval.end for interval in intervals)
    return {rank: idle(intervals, rank) / end for rank in range(placement.num_ranks)}
