"""From which sample on each step reads: where a run stands in its data, whatever its batches were before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Course:
    """The samples of the steps to come.

    batch_samples: of each of them.
    step, consumed_samples: where the run stands; samples that were left out count as consumed.
    left_out: [first, end) of samples that no step to come takes, ascending.
    """

    batch_samples: int
    step: int = 0
    consumed_samples: int = 0
    left_out: tuple[tuple[int, int], ...] = ()

    @classmethod
    def after(cls, state: Mapping[str, Any], batch_samples: int) -> "Course":
        """On from what a checkpoint's state says, from the beginning where it says nothing."""
        left_out = tuple((first, end) for first, end in state.get("left_out", ()))
        return cls(batch_samples, state.get("step", 0), state.get("consumed_samples", 0), left_out)

    def start_of(self, step: int) -> int:
        """The first sample of a step's batch; the others follow it without a gap."""
        place, steps_before = self.consumed_samples, step - self.step - 1
        for first, end in self.left_out:
            steps_until = max(0, first - place) // self.batch_samples
            if end <= place or steps_before < steps_until:
                continue
            place, steps_before = end, steps_before - steps_until
        return place + steps_before * self.batch_samples

    def end_of(self, step: int) -> int:
        """What is consumed after a step."""
        return self.start_of(step) + self.batch_samples if step > self.step else self.consumed_samples

    def without(self, step: int) -> "Course":
        """The same, but for the samples of one step, which are left out."""
        first = self.start_of(step)
        return self.leaving_out(((first, first + self.batch_samples),))

    def leaving_out(self, samples: tuple[tuple[int, int], ...]) -> "Course":
        """The same, but for further samples."""
        return replace(self, left_out=tuple(sorted({*self.left_out, *samples})))

    def state(self, step: int) -> dict[str, Any]:
        """For the checkpoint of a step."""
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return {"consumed_samples": self.end_of(step), **left_out}
