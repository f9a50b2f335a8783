"""What one rank did in a step, and when, on disk: Chrome's trace event format, which Perfetto reads.

A rank is a process, a lane a thread and a category. Spans of the lanes that may overlap are pairs of
asynchronous events, others complete events; times are microseconds of rank 0's clock since it began to
record. Facts of the run are in `otherData`. The format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMh4h6I0nSsKchNAySU
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from megalite.error import UserError
from megalite.files import write_text

LANES = ("compute", "update", "wait", "collective wait", "post", "transfer", "collective")
PLACE = ("world_size", "pp_rank", "step")  # facts of every recording
# Facts that are numbers, with the least that each can be.
COUNTS = {"world_size": 1, "pp_size": 1, "pp_rank": 0, "step": 0, "num_micro_batches": 1}
OVERLAPPING = ("transfer", "collective")
MICROSECONDS = 1e6
FILES = "timeline-rank*.json"


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
    """The spans of one rank. facts: of the run and of the rank's place in it, in plain values, by name."""

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


def found_timelines(run_dir: Path) -> list[RankTimeline]:
    """The timelines that a run has, by rank: of some ranks perhaps, and with what facts there are.

    Raises TimelineError for a file that is none.
    """
    return sorted(map(_read, run_dir.glob(FILES)), key=lambda timeline: timeline.rank)


def read_timelines(run_dir: Path) -> list[RankTimeline]:
    """All ranks' timelines of a run, by rank.

    Raises TimelineError where there are none, a rank's is missing, or they are of different steps.
    """
    found = found_timelines(run_dir)
    if not found:
        raise TimelineError(
            f"{run_dir} holds no timeline-rank0.json: set logging.timeline_at_step to a step of the run"
        )
    for timeline in found:
        missing = [name for name in PLACE if name not in timeline.facts]
        if missing:
            path = timeline_path(run_dir, timeline.rank)
            raise TimelineError(f"{path} does not say {missing[0]} in otherData: record it again")
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


def pipelines_of(timelines: Iterable[RankTimeline]) -> list[list[RankTimeline]]:
    """The ranks that hold one model together, first stage first; all as one where the facts do not say."""
    places = [(t.facts.get("pipeline", 0), t.facts.get("pp_rank", t.rank), t) for t in timelines]
    ordered = sorted(places, key=lambda place: place[:2])
    return [[timeline for *_, timeline in group] for _, group in groupby(ordered, key=lambda place: place[0])]


def _read(path: Path) -> RankTimeline:
    try:
        rank = int(path.stem.removeprefix("timeline-rank"))
        content = json.loads(path.read_text(encoding="utf-8"))
        spans = sorted(_spans(content["traceEvents"]), key=lambda span: span.begin_seconds)
        if not spans or max(span.end_seconds for span in spans) <= spans[0].begin_seconds:
            raise ValueError("it holds no spans that take time")
        return RankTimeline(rank, _facts(content.get("otherData", {})), tuple(spans))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TimelineError(f"{path} is no timeline of megalite ({error!r}): record it again") from None


def _facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are there, if they can be."""
    for name, least in COUNTS.items():
        if name in found and (type(found[name]) is not int or found[name] < least):
            raise ValueError(f"{name} is {found[name]!r}, expected a whole number from {least} on")
    return dict(found)


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
        elif event["ph"] in ("X", "e"):
            first = begun.pop(event["id"]) if event["ph"] == "e" else event
            end = event["ts"] if event["ph"] == "e" else event["ts"] + event["dur"]
            times = float(first["ts"]) / MICROSECONDS, float(end) / MICROSECONDS
            yield Span(str(first["cat"]), str(first["name"]), *times, _detail(first.get("args", {})))


def _detail(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a span; an action comes with the micro batch and the chunk that it is of."""
    detail = dict(found)
    if "action" in detail and [type(detail.get(n)) for n in ("action", "micro_batch", "chunk")] != [
        str,
        int,
        int,
    ]:
        raise ValueError(f"{detail} is no action of a micro batch and a chunk")
    return detail
