"""What gates a feed-forward layer (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Gating = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all of one shape."""
    return F.silu(gate) * up
