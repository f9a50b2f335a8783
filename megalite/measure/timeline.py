"""What one rank did in a step, and when, on disk: Chrome's trace event format, which Perfetto reads.

A rank is a process, a lane a thread. Spans of the lanes that may overlap are pairs of asynchronous events,
others complete events; times are microseconds of rank 0's clock since it began to record.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.error import UserError
from megalite.files import write_text

LANES = ("compute", "update", "wait", "collective wait", "post", "transfer", "collective")
OVERLAPPING = ("transfer", "collective")
MICROSECONDS = 1e6


class TimelineError(UserError):
    """A recorded timeline that cannot be read."""


@dataclass(frozen=True)
class Span:
    """One thing that a rank did, or waited for. detail: what it was, in plain values."""

    lane: str
    name: str
    begin_seconds: float
    end_seconds: float
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.begin_seconds


@dataclass(frozen=True)
class RankTimeline:
    """The spans of one rank. facts: of the run and of the rank's place in it, in plain values."""

    rank: int
    facts: Mapping[str, Any]
    spans: tuple[Span, ...]

    def lane(self, name: str) -> list[Span]:
        """The spans of a lane, as they began."""
        return sorted((s for s in self.spans if s.lane == name), key=lambda span: span.begin_seconds)


def timeline_path(run_dir: str | Path, rank: int) -> Path:
    """Where a rank's timeline lies."""
    return Path(run_dir, f"timeline-rank{rank}.json")


def write_timeline(path: Path, timeline: RankTimeline) -> None:
    """Write one rank's timeline, complete or not at all."""
    content = {"traceEvents": list(_events(timeline)), "displayTimeUnit": "ms"}
    facts = {"rank": timeline.rank, **timeline.facts}
    write_text(path, json.dumps(content | {"otherData": facts}) + "\n")


def write_merged(path: Path, timelines: Iterable[RankTimeline]) -> None:
    """Write all ranks into one trace."""
    events = [event for timeline in timelines for event in _events(timeline)]
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def read_timelines(run_dir: Path) -> list[RankTimeline]:
    """All ranks' timelines of a run, by rank.

    Raises TimelineError where there are none, a rank's is missing, or they are of different steps.
    """
    found = [_read(path) for path in run_dir.glob("timeline-rank*.json")]
    found.sort(key=lambda timeline: timeline.rank)
    if not found:
        raise TimelineError(
            f"{run_dir} holds no timeline-rank0.json: set logging.timeline_at_step to a step of the run"
        )
    expected = found[0].facts["world_size"]
    if [timeline.rank for timeline in found] != list(range(expected)):
        raise TimelineError(
            f"{run_dir} holds the timelines of {len(found)} ranks and the run had {expected}: "
            "remove timeline-rank*.json and record again"
        )
    steps = sorted({timeline.facts["step"] for timeline in found})
    if len(steps) > 1:
        raise TimelineError(
            f"{run_dir} holds timelines of the steps {', '.join(map(str, steps))}: "
            "remove timeline-rank*.json and record again"
        )
    return found


def _read(path: Path) -> RankTimeline:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = content["otherData"]
        return RankTimeline(facts["rank"], facts, tuple(_spans(content["traceEvents"])))
    except (ValueError, KeyError, TypeError) as error:
        raise TimelineError(f"{path} is no timeline of megalite ({error!r}): record it again") from None


def _events(timeline: RankTimeline) -> Iterator[dict[str, Any]]:
    """The trace events of a rank."""
    of_rank = {"pid": timeline.rank}
    name = f"rank {timeline.rank}, pipeline rank {timeline.facts['pp_rank']}"
    yield of_rank | {"ph": "M", "name": "process_name", "args": {"name": name}}
    yield of_rank | {"ph": "M", "name": "process_sort_index", "args": {"sort_index": timeline.rank}}
    for number, lane in enumerate(LANES):
        yield of_rank | {"ph": "M", "tid": number, "name": "thread_name", "args": {"name": lane}}
    for number, span in enumerate(timeline.spans):
        what = {"cat": span.lane, "name": span.name, "tid": LANES.index(span.lane), **of_rank}
        begin, end = (MICROSECONDS * t for t in (span.begin_seconds, span.end_seconds))
        if span.lane in OVERLAPPING:
            what["id"] = f"{timeline.rank}.{number}"
            yield what | {"ph": "b", "ts": begin, "args": dict(span.detail)}
            yield what | {"ph": "e", "ts": end}
        else:
            yield what | {"ph": "X", "ts": begin, "dur": end - begin, "args": dict(span.detail)}


def _spans(events: Iterable[Mapping[str, Any]]) -> Iterator[Span]:
    """The inverse."""
    begun: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event["ph"] == "b":
            begun[event["id"]] = event
        elif event["ph"] in "Xe":
            first = begun.pop(event["id"]) if event["ph"] == "e" else event
            end = event["ts"] if event["ph"] == "e" else event["ts"] + event["dur"]
            times = (first["ts"] / MICROSECONDS, end / MICROSECONDS)
            yield Span(first["cat"], first["name"], *times, first["args"])
