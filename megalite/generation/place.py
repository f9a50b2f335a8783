"""Where a model writes: one process, or one of several that hold it together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from megalite.checkpoint.agreement import Gather, alone, on_all_ranks

Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """This process among those that share the model."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    gather: Gather = alone

    @property
    def is_first(self) -> bool:
        """Whether it is the one that reads and prints."""
        return self.rank == 0

    def from_first(self, action: Callable[[], Result]) -> Result:
        """What an action gives on the first process, on all of them; they all call this together.

        Raises CheckpointError on all of them after a mistake on the first.
        """
        return self.gather(on_all_ranks(self.gather, lambda: action() if self.is_first else None))[0]
