"""How one parameter lies on many ranks, and how it is born there.

Each parameter carries one ShardSpec from birth. Initialisation, gradient norm, checkpoints and
converters read it; there is no second table. ZeRO-3 erases `.shape`, so the spec holds it.

Cuts are along whole dimensions, into contiguous pieces: query, key, value, gate and up are parameters of
their own. So every local tensor is one box of the full one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from megalite.parallel.context import ParallelContext
from megalite.parallel.draws import Box, draw_box, key_of
from megalite.parallel.topology import DATA_AXES


class Initializer(Protocol):
    """Draws a parameter, or the part of it that a rank needs."""

    def __call__(self, name: str, full_shape: tuple[int, ...], box: Box | None = None, /) -> torch.Tensor:
        """The box of the full initial tensor, fp32, in memory of its own; by default all of it."""


@dataclass(frozen=True)
class DimensionCut:
    """One dimension of a parameter, cut into equal contiguous pieces.

    Attributes:
        dim: the dimension.
        over: axis over whose ranks the pieces lie.
        num_pieces: how many there are.
        piece: which of them this rank holds.
        size: of the dimension without padding.
        padded_size: of what is cut, padding at its end included.
    """

    dim: int
    over: str
    num_pieces: int
    piece: int
    size: int
    padded_size: int

    @property
    def local_size(self) -> int:
        """Of this rank's piece, padding included."""
        return self.padded_size // self.num_pieces

    @property
    def start(self) -> int:
        """Where this rank's piece begins; at the end of the dimension where it is padding alone."""
        return min(self.piece * self.local_size, self.size)

    @property
    def box_size(self) -> int:
        """Of this rank's piece without padding."""
        return min(self.local_size, self.size - self.start)


@dataclass(frozen=True)
class ShardSpec:
    """What a rank holds of one parameter, or of a buffer that is state.

    Attributes:
        name: Hugging Face's name of the parameter, the same in every layout.
        full_shape: shape of the whole parameter, without padding.
        cuts: the cut dimensions, each once; none if every rank holds all of it.
        copied_over: axes of the model over whose ranks the same piece lies; on "pp" it is a tied weight's.
        copy: which of these copies this rank holds; the first is the owner.
        summed_over: axes over whose ranks the gradients are parts of a sum, made whole inside autograd.
        averaged_over: axes over whose ranks the same piece sees other data: ZeRO averages over them, and
            partitions.
    """

    name: str
    full_shape: tuple[int, ...]
    cuts: tuple[DimensionCut, ...] = ()
    copied_over: tuple[str, ...] = ()
    copy: int = 0
    summed_over: tuple[str, ...] = ()
    averaged_over: tuple[str, ...] = DATA_AXES

    @property
    def is_owner(self) -> bool:
        """Whether this copy is the one that counts in the gradient norm and goes to checkpoints."""
        return self.copy == 0

    @property
    def is_tied(self) -> bool:
        """Whether another stage holds a copy that is to stay equal."""
        return "pp" in self.copied_over

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's tensor, padding included."""
        shape = list(self.full_shape)
        for cut in self.cuts:
            shape[cut.dim] = cut.local_size
        return tuple(shape)

    @property
    def box_start(self) -> tuple[int, ...]:
        """Where this rank's part begins in the full tensor."""
        start = [0] * len(self.full_shape)
        for cut in self.cuts:
            start[cut.dim] = cut.start
        return tuple(start)

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part without padding; may be empty."""
        shape = list(self.full_shape)
        for cut in self.cuts:
            shape[cut.dim] = cut.box_size
        return tuple(shape)

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a full tensor, padding filled with zeros; always a copy."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(
                f"{self.name}: a tensor of shape {tuple(full.shape)} does not fit {self.full_shape}"
            )
        return self.padded(full[self.box]).clone()

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        """This rank's tensor, given its part [box_shape]: that itself, or with zeros behind it."""
        if self.local_shape == self.box_shape:
            return part
        local = part.new_zeros(self.local_shape)
        local[tuple(slice(0, size) for size in self.box_shape)] = part
        return local

    @property
    def entry(self) -> "ShardSpec":
        """The spec of one entry of a stack along dimension 0."""
        cuts = tuple(replace(cut, dim=cut.dim - 1) for cut in self.cuts if cut.dim > 0)
        return replace(self, full_shape=self.full_shape[1:], cuts=cuts)

    @property
    def box(self) -> tuple[slice, ...]:
        """This rank's part of the full tensor, as an index."""
        return tuple(slice(a, a + n) for a, n in zip(self.box_start, self.box_shape, strict=True))

    def tied_over_stages(self, copy: int) -> "ShardSpec":
        """The spec of a weight that two stages hold: copy 0 on the first, which owns it, 1 on the last."""
        return replace(self, copied_over=(*self.copied_over, "pp"), copy=copy)

    def over_experts(self, context: ParallelContext) -> "ShardSpec":
        """The spec of a stack whose entries lie over ep; each is the same, with other tokens, over edp.

        Raises ValueError if the pieces would not be equal.
        """
        cut = _cut(context, self.name, self.full_shape, 0, "ep")
        averaged_over = ("edp",) if cut.num_pieces > 1 else DATA_AXES
        return replace(self, cuts=(*self.cuts, cut), averaged_over=averaged_over)


def cut_spec(
    context: ParallelContext,
    name: str,
    full_shape: tuple[int, ...],
    dim: int,
    *,
    over: str = "tp",
    padded_size: int | None = None,
) -> ShardSpec:
    """Spec of a parameter that is cut along `dim` over an axis.

    over: "tp", or "kv" for key/value heads, which have copies on neighbours where they are fewer than the
    tensor-parallel ranks. Raises ValueError if the pieces would not be equal.
    """
    spec = ShardSpec(name, full_shape, (_cut(context, name, full_shape, dim, over, padded_size),))
    if over == "kv":
        spec = replace(spec, copied_over=("kv_copy",), copy=context["kv_copy"].rank, summed_over=("kv_copy",))
    return spec


def _cut(
    context: ParallelContext,
    name: str,
    full_shape: tuple[int, ...],
    dim: int,
    over: str,
    padded_size: int | None = None,
) -> DimensionCut:
    ranks = context[over]
    size = padded_size or full_shape[dim]
    if size % ranks.size:
        raise ValueError(
            f"{name}: dimension {dim} of size {size} cannot be cut into {ranks.size} equal pieces: "
            "choose a size that divides it"
        )
    return DimensionCut(dim, over, ranks.size, ranks.rank, full_shape[dim], size)


def whole_spec(
    context: ParallelContext, name: str, full_shape: tuple[int, ...], *, is_summed: bool
) -> ShardSpec:
    """Spec of a parameter that every tensor-parallel rank holds whole; rank 0 owns it.

    is_summed: each rank uses it on its own part of the sequence or of the heads, so that gradients are parts
    of a sum.
    """
    summed_over = ("tp",) if is_summed else ()
    return ShardSpec(name, full_shape, copied_over=("tp",), copy=context["tp"].rank, summed_over=summed_over)


def sharded_parameter(spec: ShardSpec, init: Initializer, dtype: torch.dtype | None = None) -> nn.Parameter:
    """This rank's part of a parameter, of the full initial tensor.

    Parameter by parameter, so building under ZeRO-3 construction never holds a whole model.
    `model_parallel` is DeepSpeed's flag for "count this one in the gradient norm".
    """
    local = spec.padded(init(spec.name, spec.full_shape, spec.box))
    return _with_spec(local.to(dtype or torch.get_default_dtype()), spec)


def stacked_parameter(
    spec: ShardSpec, names: Sequence[str], init: Initializer, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """This rank's part of a parameter that is a stack along dimension 0, each entry drawn by its own name.

    Only the entries of this rank are drawn, one at a time.
    """
    entry = spec.entry
    mine = names[spec.box[0]]
    drawn = [entry.padded(init(name, entry.full_shape, entry.box)) for name in mine]
    return _with_spec(torch.stack(drawn).to(dtype or torch.get_default_dtype()), spec)


def _with_spec(local: torch.Tensor, spec: ShardSpec) -> nn.Parameter:
    parameter = nn.Parameter(local)
    parameter.spec = spec  # type: ignore[attr-defined]
    parameter.model_parallel = spec.is_owner  # type: ignore[attr-defined]
    return parameter


def spec_of(tensor: torch.Tensor) -> ShardSpec:
    """The spec that a parameter, or a buffer that is state, carries from birth."""
    return tensor.spec  # type: ignore[attr-defined]


def register_state(module: nn.Module, name: str, spec: ShardSpec, value: float = 0.0) -> None:
    """Give a module a buffer that is state, fp32 in every precision: saved, loaded and resharded by its spec.

    Made by NumPy, as the initial weights are: ZeRO-3 construction casts what torch's factories make.
    """
    buffer = torch.from_numpy(np.full(spec.local_shape, value, dtype=np.float32))
    module.register_buffer(name, buffer)
    buffer.spec = spec  # type: ignore[attr-defined]


def state_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The buffers of a module that are state: those that carry a spec."""
    return [buffer for buffer in module.buffers() if hasattr(buffer, "spec")]


def describe_shards(module: nn.Module) -> str:
    """A layer's own parameters for `print(model)`: full shape, and what this rank holds of it."""
    shards = []
    for name, parameter in module._parameters.items():
        if parameter is not None:
            spec = spec_of(parameter)
            axes = [cut.over for cut in spec.cuts if cut.num_pieces > 1]
            here = f", {list(spec.local_shape)} here, cut over {' and '.join(axes)}" if axes else ""
            shards.append(f"{name}={list(spec.full_shape)}{here}")
    return "; ".join(shards)


def normal_initializer(seed: int, std: float = 0.02) -> Initializer:
    """Normal draws with standard deviation `std`; each depends on seed, parameter name and place alone.

    A rank draws its own part, which is the same in every layout. NumPy draws, for two reasons: ZeRO-3
    construction replaces torch's factory functions by ones that cast, and the stream is the same on every
    device. The normal distribution's quantile function makes them of uniform draws of 32 bits, in float64.
    """

    def normal(uniform: torch.Tensor) -> torch.Tensor:
        return uniform.erfinv_().mul_(2**0.5 * std)

    def draw(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
        return draw_box(key_of(seed, name), full_shape, box or _whole(full_shape), normal)

    return draw


def uniform_initializer(seed: int) -> Initializer:
    """U(-1/sqrt(i), 1/sqrt(i)) with i inputs, by seed, parameter name and place; see normal_initializer."""

    def draw(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
        bound = full_shape[-1] ** -0.5
        return draw_box(key_of(seed, name), full_shape, box or _whole(full_shape), lambda x: x.mul_(bound))

    return draw


def constant_initializer(value: float) -> Initializer:
    """Every element the same: ones for norms, zeros for biases."""

    def fill(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
        shape = [each.stop - each.start for each in box or _whole(full_shape)]
        return torch.from_numpy(np.full(shape, value, dtype=np.float32))

    return fill


def draw_like_linear(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
    """As torch.nn.Linear draws its weight, from torch's generator: U(-1/sqrt(i), 1/sqrt(i)), i inputs.

    In full, whatever the box is: torch's generator knows no places.
    """
    full = torch.empty(full_shape).uniform_(-1, 1) / full_shape[-1] ** 0.5
    return full if box is None else full[box].clone()


def draw_like_embedding(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
    """As torch.nn.Embedding draws its table, from torch's generator: N(0, 1), in full."""
    full = torch.empty(full_shape).normal_()
    return full if box is None else full[box].clone()


def _whole(full_shape: tuple[int, ...]) -> Box:
    return tuple(slice(0, size) for size in full_shape)
