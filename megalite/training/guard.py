"""Steps that would spoil the weights: seen by all ranks together, and not taken.

A step whose loss or gradient norm is no number is skipped. So is a spike, a loss or norm beyond
mean + k sigma of the steps before; or the run goes back to its newest checkpoint, and leaves the samples of
that step out. What was skipped changes nothing: weights, moments and the count of steps stay as they were.
"""

from collections import deque
from collections.abc import Callable, Mapping
from math import isfinite
from statistics import fmean, pstdev
from typing import Any, Literal

from megalite.config.guard import GuardConfig
from megalite.error import UserError
from megalite.training.trainer import StepResult

Verdict = Literal["taken", "skipped", "roll back"]


class DivergedError(UserError):
    """Steps that cannot be taken, one after another."""


class Guard:
    """Judges each step by those before it; the same on every rank, from the same numbers.

    scales_loss: whether fp16's search for a loss scale, which overflows now and then, is to be left alone.
    """

    def __init__(
        self, config: GuardConfig, report: Callable[[str], None], *, scales_loss: bool = False
    ) -> None:
        self.config, self._report, self._scales_loss = config, report, scales_loss
        self._past: deque[tuple[float, float]] = deque(maxlen=config.window_steps)  # loss, norm
        self._num_skipped = self._num_rollbacks = self._in_a_row = 0

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state()` was taken; what has been gone back over since then still counts."""
        self._past = deque(((loss, norm) for loss, norm in state.get("past", ())), self._past.maxlen)
        self._num_skipped = state.get("skipped_steps", 0)
        self._num_rollbacks = max(self._num_rollbacks, state.get("rollbacks", 0))
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        past = [list(pair) for pair in self._past]
        return {"past": past, "skipped_steps": self._num_skipped, "rollbacks": self._num_rollbacks}

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why such a step is not to be taken."""
        numbers = {"loss": loss, "gradient norm": grad_norm}
        for name, number in numbers.items():
            if not isfinite(number):
                return f"{name} {number}"
        if not self.config.spike_sigma or len(self._past) < self.config.window_steps:
            return None
        for (name, number), past in zip(numbers.items(), zip(*self._past, strict=True), strict=True):
            limit = fmean(past) + self.config.spike_sigma * pstdev(past)
            if number > limit:
                return f"{name} {number:.4g} above {limit:.4g}, mean + {self.config.spike_sigma:g} sigma"
        return None

    def conclude(
        self,
        step: int,
        result: StepResult,
        repeat: Callable[[], StepResult],
        can_go_back: Callable[[], bool],
    ) -> Verdict:
        """What becomes of a step. Raises DivergedError where too many in a row were not taken.

        repeat: computes the step once more and takes it in no case: what then is another number was not wrong
            arithmetic, or a sample, but a device.
        """
        if result.is_taken:
            if self.config.spike_sigma:
                self._past.append((result.loss, result.grad_norm))
            self._in_a_row = 0
            return "taken"
        if self._scales_loss and isfinite(result.loss) and not isfinite(result.grad_norm):
            return "skipped"
        why = self.objection(result.loss, result.grad_norm) or "another rank objects"
        why += _compared(result, repeat())
        self._in_a_row += 1
        if self._in_a_row > self.config.max_skipped_in_a_row:
            raise DivergedError(
                f"step {step}: {why}, and {self._in_a_row - 1} steps before were skipped "
                "(guard.max_skipped_in_a_row): lower optimizer.learning_rate or lengthen "
                "schedule.warmup_steps, and start from an older checkpoint"
            )
        goes_back = self.config.on_spike == "roll_back" and self._num_rollbacks < self.config.max_rollbacks
        if goes_back and can_go_back():
            self._num_rollbacks += 1
            self._report(f"step {step}: {why}: goes back, and leaves its samples out")
            return "roll back"
        self._num_skipped += 1
        self._report(f"step {step}: {why}: skipped")
        return "skipped"

    def metrics(self) -> dict[str, int]:
        """Counts since the run's beginning, where there are any."""
        counts = {"skipped_steps": self._num_skipped, "rollbacks": self._num_rollbacks}
        return {name: count for name, count in counts.items() if count}


def _compared(first: StepResult, second: StepResult) -> str:
    """Whether a step that was computed twice gave the same, to the last bit."""
    numbers = [(repr(result.loss), repr(result.grad_norm)) for result in (first, second)]  # nan is itself
    if numbers[0] == numbers[1]:
        return " (computed again: the same)"
    loss, norm = numbers[1]
    return f" (computed again: loss {loss}, gradient norm {norm}: a device may be at fault)"
