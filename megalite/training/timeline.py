"""The timeline of one step of a run, recorded on every rank: see logging.timeline_at_step.

What the stage computes, waits for and hands over comes from the runner; collectives, those of DeepSpeed too,
from torch's profiler, which runs in that step alone. On a GPU the first are events of the current stream and
the second are NCCL's kernels, both as the device saw them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megalite.measure.alignment import Meeting, clock_offset
from megalite.measure.recorder import Noted, Recorder, clock_of
from megalite.measure.timeline import RankTimeline, Span, timeline_path, write_timeline
from megalite.parallel.context import ParallelContext
from megalite.parallel.node_memory import WAIT
from megalite.pipeline.actions import WORDS, Action, Forward, Transfer, detail_of
from megalite.pipeline.recording import Record, not_recorded
from megalite.training.environment import silence_profiler
from megalite.training.world import gather

MEETINGS, ANCHORS = 20, 5  # from which the clocks of ranks, and the profiler's, are aligned
ANCHOR = "the profiler's clock meets the host's"
COLLECTIVES = ("gloo:", "node:", "ncclDevKernel")
TRANSFERS = ("gloo:send", "gloo:recv")  # the runner knows better: gloo's end when they are waited for
WITHOUT_ACTION = {"wait": "sends to leave", "update": "optimizer"}


class StepTimeline:
    """Records step `at_step`, if there is such, to `run_dir`. facts: of the run, for the file."""

    def __init__(
        self, at_step: int, run_dir: Path, context: ParallelContext, facts: Mapping[str, Any]
    ) -> None:
        self.at_step, self.run_dir, self.context, self.facts = at_step, run_dir, context, facts

    def __call__(self, step: int) -> AbstractContextManager[Record]:
        """The record of a step, to be entered by all ranks at once."""
        return self._recorded() if step == self.at_step else _unrecorded()

    @contextmanager
    def _recorded(self) -> Iterator[Record]:
        device, rank = self.context.device, self.context.rank
        silence_profiler()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities) as profiler:
            everyone = gather([_meeting(device) for _ in range(MEETINGS)])
            offset = clock_offset(everyone[rank], everyone[0])
            recorder: Recorder[Action | None] = Recorder(clock_of(device))
            _meeting(device)
            anchors = [_anchor() for _ in range(ANCHORS)]
            yield recorder
        begin = everyone[0][-1][1] + offset.seconds
        spans = [*_spans(recorder.noted()), *_collectives(profiler.events(), anchors)]
        moved = [
            Span(s.lane, s.name, s.begin_seconds - begin, s.end_seconds - begin, s.detail) for s in spans
        ]
        facts = {**self.facts, **_place(self.context), "step": self.at_step}
        facts |= {"clock_error_seconds": offset.error_seconds}
        write_timeline(timeline_path(self.run_dir, rank), RankTimeline(rank, facts, tuple(moved)))


@contextmanager
def _unrecorded() -> Iterator[Record]:
    yield not_recorded


def _meeting(device: torch.device) -> Meeting:
    """When this rank came to a sum over all ranks, and when it had it: nobody has it before all have come."""
    came = time.perf_counter()
    number = torch.ones((), device=device)
    dist.all_reduce(number)
    number.item()
    return came, time.perf_counter()


def _place(context: ParallelContext) -> dict[str, Any]:
    """Where a rank stands. pipeline: a number for the ranks that hold one model, and the same part of it."""
    pp = context["pp"]
    members = context.topology.members(context.rank, "pp")
    return {
        "world_size": context.topology.world_size,
        "pp_rank": pp.rank,
        "pp_size": pp.size,
        "pipeline": min(members),
    }


def _spans(noted: list[Noted]) -> Iterator[Span]:
    """What the runner did, and its receives, from where they were posted until they were seen to be there."""
    posted: dict[tuple[str, int, int], Noted] = {}
    for note in noted:
        lane, action, begin, end = note
        if action is None:
            yield Span(lane, WITHOUT_ACTION[lane], begin, end)
            continue
        detail = detail_of(action)
        if isinstance(action, Transfer):
            yield Span(lane, f"{action.verb} {action.kind} {action.micro_batch}", begin, end, detail)
            if action.verb == "receive":
                posted[action.kind, action.micro_batch, action.chunk] = note
            continue
        yield Span(lane, f"{WORDS[type(action)]} {action.micro_batch}", begin, end, detail)
        if lane == "wait":
            kind = "activation" if isinstance(action, Forward) else "gradient"
            receive = posted.pop((kind, action.micro_batch, action.chunk))
            name, detail = f"{kind} {action.micro_batch}", asdict(receive.what)
            yield Span("transfer", name, receive.end_seconds, end, detail)


def _anchor() -> Meeting:
    """An event for the profiler, which begins and ends within these times of the host."""
    came = time.perf_counter()
    with record_function(ANCHOR):
        pass
    return came, time.perf_counter()


def _collectives(events: Sequence[Any], anchors: Sequence[Meeting]) -> Iterator[Span]:
    """The collectives of torch's profiler, and the layers' waits for them, which lie within computations."""

    def times(event: Any) -> Meeting:
        return event.time_range.start * 1e-6, event.time_range.end * 1e-6

    behind = clock_offset(anchors, sorted(times(event) for event in events if event.name == ANCHOR)).seconds
    for event in events:
        begin, end = (behind + seconds for seconds in times(event))
        is_collective = event.name.startswith(COLLECTIVES) and event.name not in TRANSFERS
        if begin < anchors[-1][1] or not (is_collective or event.name == WAIT):
            continue  # those before have aligned the clocks
        yield Span("collective wait" if event.name == WAIT else "collective", event.name, begin, end)
