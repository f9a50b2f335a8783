"""When a run's checkpoints are written: at once, or beside the training, from a copy in host memory.

    training thread   step | copy | step   step   step   step | copy | step ...
    saving thread                 | write, sync, publish |            | write ...

One save is in flight at most: the next one waits for it, and so do the end of training and a stop. The copy's
memory, as much as this rank writes, is taken at the first save and used again by all others. The ranks'
threads speak with each other over a group of their own, for a group serves one thread. With
checkpoint.local_dir the same thread copies what the nodes have to RUN_DIR/checkpoints.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.format import CheckpointError, Piece, folder_step
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import StageEngine
from megalite.training.stopping import Request
from megalite.training.world import gather

LONGEST_SAVE = timedelta(days=1)  # a rank that dies ends the job at once: nothing else is to


class HostCopy:
    """Memory for a copy of what a rank writes."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, int], torch.Tensor] = {}

    def of(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces, those that are owned as copies; valid until the next call."""
        copies = [replace(piece, tensor=self._fill(piece)) if piece.owned else piece for piece in pieces]
        if any(piece.tensor.is_cuda for piece in pieces):
            torch.cuda.synchronize()
        return copies

    def _fill(self, piece: Piece) -> torch.Tensor:
        tensor, key = piece.tensor.detach(), (piece.kind, piece.name, piece.flat_start)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self._buffers[key].copy_(tensor, non_blocking=True)


class Saving:
    """The checkpoints of a run as it goes on; collective.

    failure: of the newest save that has ended.
    """

    def __init__(
        self, checkpoints: Checkpoints, settings: CheckpointConfig, report: Callable[[str], None]
    ) -> None:
        self._checkpoints, self._settings, self._report = checkpoints, settings, report
        self._stall_seconds: float | None = None
        self._num_failed = self._num_saves = 0
        self._newest: Path | None = None
        self._copy = HostCopy()
        self._in_flight: Future[Path] | None = None
        self.failure: CheckpointError | None = None
        if settings.asynchronous:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")

    def save(
        self,
        engine: StageEngine,
        step: int,
        standing: Mapping[str, Any] | None = None,
        request: Request | None = None,
    ) -> None:
        """Save a step, or begin to. CheckpointError where this or the last one failed, if that is to stop.

        request: for it, by a person or a scheduler, who look for it in RUN_DIR/checkpoints.
        """
        started = time.perf_counter()
        self.finish()
        capture = self._checkpoints.capture(engine, step, standing)
        is_asked = request is not None and request.saves
        share = is_asked or self._num_saves % self._settings.shared_every_saves == 0
        self._num_saves += 1
        if self._settings.asynchronous:
            capture = replace(capture, pieces=self._copy.of(capture.pieces))
            self._in_flight = self._thread.submit(self._checkpoints.write, capture, self._gather, share=share)
        else:
            self._conclude(lambda: self._checkpoints.write(capture, gather, share=share))
        self._stall_seconds = time.perf_counter() - started

    def is_due(self, step: int, is_last: bool, request: Request | None) -> bool:
        """Whether to save after a step: by its number, as the last, or since that is asked for."""
        every = self._settings.save_every_steps
        by_number = every > 0 and step % every == 0
        is_asked = request is not None and request.saves
        return by_number or is_asked or (is_last and self._settings.save_at_end)

    @property
    def has_failed(self) -> bool:
        """Whether the save in flight has come to an end, and not to a good one."""
        future = self._in_flight
        return future is not None and future.done() and future.exception() is not None

    def metrics(self) -> dict[str, float]:
        """What there is to tell since the last call."""
        stall, self._stall_seconds = self._stall_seconds, None
        told = {} if stall is None else {"save_stall_seconds": stall}
        return told | ({"failed_saves": self._num_failed} if self._num_failed else {})

    def finish(self) -> None:
        """Wait for the save in flight. CheckpointError as in `save`."""
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            self._conclude(future.result)

    def end(self) -> None:
        """The same, at the end of training: then the newest is in RUN_DIR/checkpoints too."""
        self.finish()
        newest = self._newest
        if self.failure is None and newest is not None and not self._checkpoints.is_shared(newest):
            step = folder_step(newest)
            assert step is not None
            self._conclude(lambda: self._checkpoints.share(step, gather))

    def newest_state(self) -> Mapping[str, Any]:
        """That of the newest checkpoint of the run, empty where it has none."""
        self.finish()
        return self._checkpoints.look()

    def go_back(self, engine: StageEngine) -> Mapping[str, Any]:
        """Put the engine where the newest checkpoint has it, which `newest_state` has found; its state."""
        return self._checkpoints.go_back(engine)

    def _conclude(self, result: Callable[[], Path]) -> None:
        try:
            self._newest, self.failure = result(), None
        except CheckpointError as error:  # on all ranks alike
            self.failure, self._num_failed = error, self._num_failed + 1
            if self._settings.on_failure == "stop":
                raise
            self._report(f"{error}; training goes on (checkpoint.on_failure)")

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values
