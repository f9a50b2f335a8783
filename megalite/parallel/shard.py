"""How one parameter is cut over the tensor-parallel ranks.

Each parameter carries one ShardSpec from birth. Initialisation, gradient norm, checkpoints and
converters read it; there is no second table. ZeRO-3 erases `.shape`, so the spec holds it.

A parameter is cut along one dimension at most, into contiguous pieces: query, key, value, gate and up
are parameters of their own. So every local tensor is one box of the full one.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from megalite.parallel.context import Group, group_rank, group_size

Initializer = Callable[[str, tuple[int, ...]], torch.Tensor]  # (name, full shape) -> full tensor, fp32


@dataclass(frozen=True)
class ShardSpec:
    """What a rank holds of one parameter.

    Attributes:
        name: Hugging Face's name of the parameter, the same in every layout.
        full_shape: shape of the whole parameter, without padding.
        dim: the cut dimension, None if every rank holds all of it.
        num_pieces: pieces along `dim`.
        piece: which of them this rank holds.
        padded_size: size of `dim` that is cut, padding at its end included (default: no padding).
        is_owner: this rank's copy is the one that counts in the gradient norm and goes to checkpoints.
        tied: shared by the first and the last stage.
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int | None = None
    num_pieces: int = 1
    piece: int = 0
    padded_size: int | None = None
    is_owner: bool = True
    tied: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's tensor, padding included."""
        if self.dim is None:
            return self.full_shape
        shape = list(self.full_shape)
        shape[self.dim] = self._padded_size // self.num_pieces
        return tuple(shape)

    @property
    def box_start(self) -> tuple[int, ...]:
        """Where this rank's part begins in the full tensor."""
        start = [0] * len(self.full_shape)
        if self.dim is not None:
            start[self.dim] = min(self.piece * self.local_shape[self.dim], self.full_shape[self.dim])
        return tuple(start)

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part without padding; may be empty."""
        shape = list(self.local_shape)
        if self.dim is not None:
            shape[self.dim] = min(shape[self.dim], self.full_shape[self.dim] - self.box_start[self.dim])
        return tuple(shape)

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a full tensor, padding filled with zeros; always a copy."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(
                f"{self.name}: a tensor of shape {tuple(full.shape)} does not fit {self.full_shape}"
            )
        if self.dim is None:
            return full.clone()
        part = full.narrow(self.dim, self.box_start[self.dim], self.box_shape[self.dim])
        local = full.new_zeros(self.local_shape)
        local.narrow(self.dim, 0, self.box_shape[self.dim]).copy_(part)
        return local

    @property
    def _padded_size(self) -> int:
        assert self.dim is not None
        return self.padded_size or self.full_shape[self.dim]


def cut_over(
    group: Group,
    name: str,
    full_shape: tuple[int, ...],
    dim: int,
    *,
    replicas: int = 1,
    padded_size: int | None = None,
    tied: bool = False,
    is_owner: bool = True,
) -> ShardSpec:
    """Spec of a parameter that is cut along `dim` over a group.

    replicas: neighbouring ranks that hold the same piece (KV heads when they are fewer than the ranks).
    Raises ValueError if the pieces would not be equal.
    """
    num_pieces, remainder = divmod(group_size(group), replicas)
    size = padded_size or full_shape[dim]
    if remainder or size % num_pieces:
        raise ValueError(
            f"{name}: dimension {dim} of size {size} cannot be cut into {group_size(group)}/{replicas} equal "
            "pieces: change tp_size"
        )
    piece, replica = divmod(group_rank(group), replicas)
    return ShardSpec(name, full_shape, dim, num_pieces, piece, padded_size, is_owner and replica == 0, tied)


def replicated_over(group: Group, name: str, full_shape: tuple[int, ...]) -> ShardSpec:
    """Spec of a parameter that every rank of a group holds whole; rank 0 owns it."""
    return ShardSpec(name, full_shape, is_owner=group_rank(group) == 0)


def sharded_parameter(spec: ShardSpec, init: Initializer, dtype: torch.dtype | None = None) -> nn.Parameter:
    """This rank's part of a parameter, cut from the full initial tensor.

    The full tensor lives only within this call, so building under ZeRO-3 construction never holds a
    whole model. `model_parallel` is DeepSpeed's flag for "count this one in the gradient norm".
    """
    full = init(spec.name, spec.full_shape)
    parameter = nn.Parameter(spec.cut(full).to(dtype or torch.get_default_dtype()))
    parameter.spec = spec  # type: ignore[attr-defined]
    parameter.model_parallel = spec.is_owner  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: torch.Tensor) -> ShardSpec:
    """The spec that a parameter carries from birth."""
    return parameter.spec  # type: ignore[attr-defined]


def normal_initializer(seed: int, std: float = 0.02) -> Initializer:
    """Normal draws with standard deviation `std` that depend on seed and parameter name alone.

    NumPy draws, for two reasons: ZeRO-3 construction replaces torch's factory functions by ones that
    cast, and the stream is the same on every device.
    """

    def draw(name: str, full_shape: tuple[int, ...]) -> torch.Tensor:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        return torch.from_numpy(generator.standard_normal(full_shape, dtype=np.float32) * np.float32(std))

    return draw


def constant_initializer(value: float) -> Initializer:
    """Every element the same: ones for norms, zeros for biases."""

    def fill(name: str, full_shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(np.full(full_shape, value, dtype=np.float32))

    return fill
