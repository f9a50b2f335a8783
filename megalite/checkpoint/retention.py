"""Which of a run's checkpoints stay when a new one is there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The newest ones, and others beside them.

    last: how many of the newest stay; 0 means all.
    every_steps: those of steps that it divides stay as well; 0 means none.
    best: so many with the lowest validation loss stay as well.
    """

    last: int = 0
    every_steps: int = 0
    best: int = 0

    def superseded(self, steps: Sequence[int], loss_of: Callable[[int], float | None]) -> list[int]:
        """Those of `steps`, ascending, that need not stay. The last one always does.

        loss_of: the validation loss of a step's checkpoint, None where none was measured; of equal ones the
            earlier is the better.
        """
        if not self.last:
            return []
        kept = {*steps[-self.last :], *(step for step in steps if self._is_milestone(step))}
        if self.best:
            losses = {step: loss for step in steps if (loss := loss_of(step)) is not None}
            kept |= set(sorted(losses, key=lambda step: (losses[step], step))[: self.best])
        return [step for step in steps if step not in kept]

    def _is_milestone(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0


KEEP_ALL = Retention()
