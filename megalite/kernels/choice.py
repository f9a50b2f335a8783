"""Which kernel computes what, in one value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.torch_version import TorchVersion

from megalite.error import UserError
from megalite.kernels.adamw import ADAMW, ADAMW_PACKAGES, AdamUpdate
from megalite.kernels.attention import ATTENTIONS, Attention, attend_by_sdpa, attention_of
from megalite.kernels.blocks import attend_in_blocks
from megalite.kernels.compiled import compiled_in_training, missing_compiler
from megalite.kernels.gating import GATING_PACKAGES, GATINGS, Gating, gate_by_torch
from megalite.kernels.norm import NORM_PACKAGES, NORMS, Norm, norm_by_torch, norm_of
from megalite.kernels.package import Source
from megalite.kernels.products import PRODUCTS, MatrixProducts, has_onednn, products_of
from megalite.kernels.rotation import Rotation, rotate, rotate_by_formula

AUTO = "auto"
LEAST_FOR_VARLEN = (8, 0)  # compute capability of FlashAttention's kernels, A100's


class KernelError(UserError):
    """A kernel that was asked for cannot run here."""


@dataclass(frozen=True)
class Kernels:
    """What layers and optimizer compute with; by default torch's own, as transformers does.

    Attributes:
        attention: (query, key, value, sight) to the output; see attention.py.
        norm: (x, weight, eps) to the RMSNorm; see norm.py.
        products: the matrix products of linear layers; see products.py.
        rotation: (heads, cos, sin) to the heads turned; see rotation.py.
        gating: (gate, up) to silu(gate) * up; see gating.py.
        expert_gating: the same in routed experts, of which each step has other numbers of tokens.
        adamw: AdamW's update, None for that of torch's optimizer; see adamw.py.
        names: of all, to be told.
    """

    attention: Attention = attend_by_sdpa
    norm: Norm = norm_by_torch
    products: MatrixProducts = PRODUCTS["torch"]
    rotation: Rotation = rotate
    gating: Gating = gate_by_torch
    expert_gating: Gating = gate_by_torch
    adamw: AdamUpdate | None = None
    names: str = "attention sdpa, norm torch, products torch, gating torch, adamw torch"


def choose_kernels(
    attention: str,
    norm: str,
    device: torch.device,
    *,
    products: str = AUTO,
    gating: str = AUTO,
    adamw: str = AUTO,
    attention_kept_tokens: int | None = None,
    compile_blocks: bool = False,
) -> Kernels:
    """Kernels by their names; KernelError where one cannot train.

    `auto` is what serves the device best of what comes with torch: the kernels of other packages were not
    compared with the formula on a GPU yet.

    adamw: the run's `optimizer.implementation`.
    attention_kept_tokens: see `kept_tokens` in blocks.py; None means its default.
    compile_blocks: whether torch.compile makes the rotation, and norm and gating where they are not named.
    """
    compiled = {part for part, name in (("norm", norm), ("gating", gating)) if name == AUTO}
    attention = attention_of(device) if attention == AUTO else attention
    norm = norm_of(device) if norm == AUTO else norm
    products = products_of(device) if products == AUTO else products
    gating, adamw = ("torch" if name == AUTO else name for name in (gating, adamw))
    _require("kernels.norm", norm, NORM_PACKAGES, device)
    _require("kernels.gating", gating, GATING_PACKAGES, device)
    _require("optimizer.implementation", adamw, ADAMW_PACKAGES, device)
    if products == "onednn" and not (device.type == "cpu" and has_onednn()):
        raise KernelError(
            f"kernels.products onednn needs a CPU and a torch with oneDNN, and this run is on "
            f"a {device.type}: set kernels.products=torch"
        )
    names = f"attention {attention}, norm {norm}, products {products}, gating {gating}, adamw {adamw}"
    attend = _attention(attention, device, attention_kept_tokens)
    kernels = Kernels(
        attend,
        NORMS[norm],
        products=PRODUCTS[products],
        gating=GATINGS[gating],
        expert_gating=GATINGS[gating],
        adamw=ADAMW[adamw],
        names=names,
    )
    return _compiled(kernels, device, {"rotation", *compiled}) if compile_blocks else kernels


def _compiled(kernels: Kernels, device: torch.device, parts: set[str]) -> Kernels:
    """The kernels with these parts between matrix products compiled; KernelError where that cannot be."""
    missing = missing_compiler(device)
    if missing:
        raise KernelError(
            f"kernels.compile_blocks needs {missing} on a {device.type} and finds none: install it, or set "
            "kernels.compile_blocks=false"
        )
    formulas: dict[str, Any] = {"norm": norm_by_torch, "rotation": rotate_by_formula, "gating": gate_by_torch}
    made: dict[str, Any] = {
        part: compiled_in_training(formula, getattr(kernels, part))
        for part, formula in formulas.items()
        if part in parts
    }
    return replace(kernels, **made, names=f"{kernels.names}, compiled in training: {', '.join(made)}")


def _attention(name: str, device: torch.device, kept_tokens: int | None) -> Attention:
    if name == "flex" and device.type == "cpu":
        raise KernelError(
            "kernels.attention flex cannot train on a CPU, where torch has no backward of it: "
            "use blocks or sdpa"
        )
    if name == "varlen" and (device.type != "cuda" or TorchVersion(torch.__version__) < "2.13"):
        raise KernelError(
            f"kernels.attention varlen needs a GPU and torch 2.13, and this run is on {device.type} with "
            f"torch {torch.__version__}: use kernels.attention=auto"
        )
    if name == "varlen" and torch.cuda.get_device_capability(device) < LEAST_FOR_VARLEN:
        raise KernelError(
            "kernels.attention varlen needs a GPU of compute capability {}.{}, and this one has {}.{}: use "
            "kernels.attention=auto".format(*LEAST_FOR_VARLEN, *torch.cuda.get_device_capability(device))
        )
    if kept_tokens is None:
        return ATTENTIONS[name]
    if name != "blocks":
        raise KernelError(
            f"kernels.attention_kept_tokens {kept_tokens} is of kernels.attention blocks, and "
            f"this run has {name}: remove it, or set kernels.attention=blocks"
        )
    return partial(attend_in_blocks, kept_tokens=kept_tokens)


def _require(setting: str, name: str, packages: Mapping[str, Source], device: torch.device) -> None:
    """Raise KernelError where a kernel is of a package that is not here, or not for the device."""
    package = packages.get(name)
    refusal = package.refusal(setting, name, device) if package else None
    if refusal:
        raise KernelError(refusal)
