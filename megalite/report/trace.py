"""The recorded timeline of a step: a rank's file in Chrome's trace event format, as spans.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMh4h6I0nSsKchNAySU. Complete events
(X) and pairs of asynchronous ones (b, e) are read; a rank is a process (pid), a lane a category (cat), and
times are microseconds. What the file says of the run besides is in `otherData`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.report.content import ReportError

FILES = "timeline-rank*.json"
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Span:
    """One thing that a rank did. kind: what it was, without the number of its micro batch."""

    rank: int
    lane: str
    name: str
    begin_seconds: float
    end_seconds: float
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.begin_seconds

    @property
    def kind(self) -> str:
        return self.name.rstrip("0123456789 ") if self.lane == "compute" else self.lane


@dataclass(frozen=True)
class Trace:
    """What one rank recorded of a step. facts: of the run and of the rank, by name."""

    facts: Mapping[str, Any]
    spans: Sequence[Span]


def read_traces(run_dir: Path) -> list[Trace]:
    """The traces of all ranks that have one, in the order of ranks. ReportError for a file that is none."""
    found = [_read(path) for path in run_dir.glob(FILES)]
    return sorted(found, key=lambda trace: trace.spans[0].rank)


def _read(path: Path) -> Trace:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        spans = sorted(_spans(content["traceEvents"]), key=lambda span: span.begin_seconds)
        facts = dict(content.get("otherData", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path.name} is not a timeline in Chrome's format ({error!r})") from None
    if not spans:
        raise ReportError(f"{path.name} holds no spans")
    return Trace(facts, spans)


def _spans(events: Iterable[Mapping[str, Any]]) -> Iterator[Span]:
    begun: dict[Any, Mapping[str, Any]] = {}
    for event in events:
        if event["ph"] == "b":
            begun[event["id"]] = event
        elif event["ph"] in ("X", "e"):
            first = begun.pop(event["id"]) if event["ph"] == "e" else event
            end = event["ts"] if event["ph"] == "e" else event["ts"] + event["dur"]
            times = float(first["ts"]) / MICROSECONDS, float(end) / MICROSECONDS
            yield Span(int(first["pid"]), first["cat"], str(first["name"]), *times, first.get("args", {}))
