"""Which kernel computes what, in one value."""

from dataclasses import dataclass
from functools import partial

import torch

from megalite.error import UserError
from megalite.kernels.attention import ATTENTIONS, Attention, attend_by_sdpa, attention_of
from megalite.kernels.blocks import attend_in_blocks
from megalite.kernels.norm import NORMS, Norm, norm_by_torch, norm_of

AUTO = "auto"


class KernelError(UserError):
    """A kernel that was asked for cannot run here."""


@dataclass(frozen=True)
class Kernels:
    """What the layers of a model compute with; by default torch's own, as transformers does.

    Attributes:
        attention: (query, key, value, sight) to the output; see attention.py.
        norm: (x, weight, eps) to the RMSNorm; see norm.py.
        names: of both, to be told.
    """

    attention: Attention = attend_by_sdpa
    norm: Norm = norm_by_torch
    names: str = "attention sdpa, norm torch"


def choose_kernels(
    attention: str, norm: str, device: torch.device, *, attention_kept_tokens: int | None = None
) -> Kernels:
    """Kernels by their names, `auto` for what serves the device best; KernelError where one cannot train.

    attention_kept_tokens: see `kept_tokens` in blocks.py; None means its default.
    """
    attention = attention_of(device) if attention == AUTO else attention
    norm = norm_of(device) if norm == AUTO else norm
    if attention == "flex" and device.type == "cpu":
        raise KernelError(
            "kernels.attention flex cannot train on a CPU, where torch has no backward of it: "
            "use blocks or sdpa"
        )
    attend = ATTENTIONS[attention]
    if attention_kept_tokens is not None:
        if attention != "blocks":
            raise KernelError(
                f"kernels.attention_kept_tokens {attention_kept_tokens} is of kernels.attention blocks, and "
                f"this run has {attention}: remove it, or set kernels.attention=blocks"
            )
        attend = partial(attend_in_blocks, kept_tokens=attention_kept_tokens)
    return Kernels(attend, NORMS[norm], f"attention {attention}, norm {norm}")
