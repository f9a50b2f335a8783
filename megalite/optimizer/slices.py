"""Which elements of a parameter a rank steps, and where they lie in what the torch optimizer knows."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class MasterSlice:
    """The elements [start, start + numel) of a flattened parameter, whose fp32 masters this rank steps.

    They lie at `offset` in `flat`, the tensor that the inner optimizer knows.
    """

    parameter: nn.Parameter
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice's elements in `flat`, or in a state of the same shape; a live view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)
