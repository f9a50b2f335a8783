"""Which kernel computes what, in one value."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from megalite.error import UserError
from megalite.kernels.attention import ATTENTIONS, Attention, attend_by_sdpa, attention_of
from megalite.kernels.blocks import attend_in_blocks
from megalite.kernels.compiled import compiled_in_training, missing_compiler
from megalite.kernels.gating import Gating, gated
from megalite.kernels.norm import NORMS, Norm, norm_by_torch, norm_of
from megalite.kernels.rotation import Rotation, rotate, rotate_by_formula

AUTO = "auto"


class KernelError(UserError):
    """A kernel that was asked for cannot run here."""


@dataclass(frozen=True)
class Kernels:
    """What the layers of a model compute with; by default torch's own, as transformers does.

    Attributes:
        attention: (query, key, value, sight) to the output; see attention.py.
        norm: (x, weight, eps) to the RMSNorm; see norm.py.
        rotation: (heads, cos, sin) to the heads turned; see rotation.py.
        gating: (gate, up) to what goes down again; see gating.py.
        names: of those that were chosen, to be told.
    """

    attention: Attention = attend_by_sdpa
    norm: Norm = norm_by_torch
    rotation: Rotation = rotate
    gating: Gating = gated
    names: str = "attention sdpa, norm torch"


def choose_kernels(
    attention: str,
    norm: str,
    device: torch.device,
    *,
    attention_kept_tokens: int | None = None,
    compile_blocks: bool = False,
) -> Kernels:
    """Kernels by their names, `auto` for what serves the device best; KernelError where one cannot train.

    attention_kept_tokens: see `kept_tokens` in blocks.py; None means its default.
    compile_blocks: whether torch.compile makes those of rotation and gating, and of a norm that is not named.
    """
    attention = attention_of(device) if attention == AUTO else attention
    compiles_norm = compile_blocks and norm == AUTO
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
    kernels = Kernels(attend, NORMS[norm], names=f"attention {attention}, norm {norm}")
    return _compiled(kernels, device, with_norm=compiles_norm) if compile_blocks else kernels


def _compiled(kernels: Kernels, device: torch.device, *, with_norm: bool) -> Kernels:
    """The kernels with the parts between matrix products compiled; KernelError where that cannot be."""
    missing = missing_compiler(device)
    if missing:
        raise KernelError(
            f"kernels.compile_blocks needs {missing} on a {device.type} and finds none: install it, or set "
            "kernels.compile_blocks=false"
        )
    return replace(
        kernels,
        norm=compiled_in_training(norm_by_torch, kernels.norm) if with_norm else kernels.norm,
        rotation=compiled_in_training(rotate_by_formula, kernels.rotation),
        gating=compiled_in_training(gated, kernels.gating),
        names=f"{kernels.names}, compiled in training: {'norm, ' if with_norm else ''}rotation, gating",
    )
