"""Requests to save or to stop, which reach one rank or many: all ranks agree on them after each step.

    SIGTERM, SIGINT, SIGUSR1 on any rank; RUN_DIR/stop; the end of stop.after_minutes     save, and stop
    RUN_DIR/save                                                                          save

A second signal ends its process at once.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
FAILED_SAVE = "a checkpoint that was not saved"
SAVE, STOP, TIME = "the file 'save'", "the file 'stop'", "stop.after_minutes"
REASONS = (FAILED_SAVE, SAVE, STOP, TIME, *(number.name for number in SIGNALS))  # the last one wins
ECHO_SECONDS = 1.0  # in which a launcher may send a terminal's signal once more


@dataclass(frozen=True)
class Request:
    """What all ranks attend to after a step: a save in flight that failed, else to save now, and to stop."""

    reason: str
    rank: int

    @property
    def saves(self) -> bool:
        return self.reason != FAILED_SAVE

    @property
    def stops(self) -> bool:
        return self.reason not in (FAILED_SAVE, SAVE)


class Signals:
    """Takes signals down in place of ending this process; what it forks ends by them as usual.

    first: the name of the first that came.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        self._came_at = 0.0
        for number in SIGNALS:
            signal.signal(number, self._take)
        os.register_at_fork(after_in_child=_end_by_signals)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._came_at = signal.Signals(number).name, now
        elif now - self._came_at > ECHO_SECONDS:
            os.write(2, b"error: a second signal: left at once, what is not saved is lost\n")
            os._exit(128 + number)

    def ignore(self) -> None:
        """From now on: this process leaves by itself."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _end_by_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class Stopping:
    """This rank's part in the agreement. Rank 0 looks for the files and at the clock.

    started_at: of the job, by time.monotonic().
    """

    def __init__(
        self,
        run_dir: Path,
        after_minutes: float | None,
        signals: Signals,
        device: torch.device,
        started_at: float,
    ) -> None:
        self._files = {SAVE: run_dir / "save", STOP: run_dir / "stop"}
        self._signals, self._device = signals, device
        self._ends_at = float("inf") if after_minutes is None else started_at + 60 * after_minutes
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def agree(self, own: str | None = None) -> Request | None:
        """The request that is heeded now, the same on every rank; collective. own: another reason here."""
        reason = self._own_reason() or own
        mine = 0 if reason is None else 1 + REASONS.index(reason) * self._world_size + self._rank
        highest = torch.tensor(mine, dtype=torch.int64, device=self._device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        value = int(highest)
        if not value:
            return None
        reason_index, rank = divmod(value - 1, self._world_size)
        return Request(REASONS[reason_index], rank)

    def _own_reason(self) -> str | None:
        if self._signals.first is not None:
            return self._signals.first
        if self._rank != 0:
            return None
        if time.monotonic() >= self._ends_at:
            return TIME
        return next((reason for reason in (STOP, SAVE) if self._taken(self._files[reason])), None)

    @staticmethod
    def _taken(file: Path) -> bool:
        """Whether the file is there; it is removed, to count once."""
        try:
            file.unlink()
        except FileNotFoundError:
            return False
        return True
