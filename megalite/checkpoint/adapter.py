"""Adapters read as the weights that they make of their base: W + scale B A, tensor by tensor.

W is what the base's checkpoint holds. The sum is taken in float32, of the box that is asked for alone, and is
rounded once, to the dtype that is asked for; nothing of another tensor is in memory.

    W[rows, columns] + scale (B[rows, :] @ A[:, columns])        W [o, i]    A [r, i]    B [o, r]

Adapters of adapters (a run that began with another one's) are added one after another, the oldest first.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from megalite.checkpoint.base import base_of
from megalite.checkpoint.format import WIDEST_DTYPE, CheckpointError, Piece, Region
from megalite.checkpoint.load import TensorReader, read_config
from megalite.config.tuning import LoraConfig
from megalite.parallel.lora import LORA_A, LORA_B

WEIGHT = "weight"  # both the kind and, of a layer's tensors, the one that has an adapter


def open_weights(checkpoint: Path) -> TensorReader:
    """A reader of a checkpoint's weights and buffers, merged where it is one of adapters.

    Raises CheckpointError when a base is missing or is another one, or does not fit.
    """
    adapters: list[Adapter] = []
    folder = Path(checkpoint)
    while base := base_of(folder):
        base.check(folder)
        adapters.insert(0, Adapter(TensorReader(folder), read_config(folder).lora.scale))
        folder = base.folder
    reader = TensorReader(folder)
    return MergedReader(reader, adapters) if adapters else reader


def is_adapter(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


def check_same_adapter(there: LoraConfig, here: LoraConfig, where: str) -> None:
    """Raise CheckpointError where an adapter at `where` and a run's settings are not of one function."""
    for name in ("rank", "alpha", "rank_stabilized", "targets"):
        before, now = getattr(there, name), getattr(here, name)
        if name == "targets":
            before, now = sorted(before), sorted(now)
        if before != now:
            raise CheckpointError(
                f"lora.{name} is {_text(before)} in {where} and {_text(now)} in this run: "
                f"say lora.{name}={_text(before)}, or begin with another adapter"
            )


def _text(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


class Adapter(NamedTuple):
    """A checkpoint of adapters, and what their products are multiplied with."""

    reader: TensorReader
    scale: float

    def has(self, weight: str) -> bool:
        """Whether a weight has one."""
        return (WEIGHT, _factors(weight)[0]) in self.reader.shapes

    def product(self, weight: str, region: Region) -> torch.Tensor:
        """A flat region of scale B A, float32. Of B, only the rows that the region touches are read."""
        (row, column), (_, width) = region.box_start, region.box_shape
        first, last = region.start // width, -(-(region.start + region.size) // width)
        a_name, b_name = _factors(weight)
        rank = self.reader.shapes[WEIGHT, a_name][0]
        a = self.reader.read_box(WEIGHT, a_name, (0, column), (rank, width))
        b = self.reader.read_box(WEIGHT, b_name, (row + first, 0), (last - first, rank))
        return (b @ a).mul_(self.scale).view(-1)[region.start - first * width :][: region.size]


class MergedReader(TensorReader):
    """Reads the weights and buffers of a base as adapters change them.

    base: a reader of whole weights; `adapters`: in the order in which they were trained.
    """

    def __init__(self, base: TensorReader, adapters: Sequence[Adapter]) -> None:
        super().__init__(base.checkpoint, base.manifest)
        self.base, self.adapters = base, list(adapters)
        for adapter in adapters:
            self._check_fit(adapter)

    def fill(self, pieces: Sequence[Piece], *, first_rank: int = 0) -> None:
        """As of one checkpoint; a piece that adapters change is made in float32, and then rounded."""
        found = [(piece, self._adapters_of(piece.kind, piece.name)) for piece in pieces]
        self.base.fill([piece for piece, adapters in found if not adapters], first_rank=first_rank)
        for piece, adapters in found:
            if adapters and piece.tensor.numel():
                self._fill_merged(piece, adapters, first_rank)

    def let_go(self) -> None:
        self.base.let_go()
        for adapter in self.adapters:
            adapter.reader.let_go()

    @torch.no_grad()
    def _fill_merged(self, piece: Piece, adapters: Sequence[Adapter], first_rank: int) -> None:
        wide = replace(piece, tensor=torch.empty(piece.tensor.shape, dtype=WIDEST_DTYPE))
        self.base.fill([wide], first_rank=first_rank)
        for adapter in adapters:
            wide.tensor.add_(adapter.product(piece.name, piece.region))
        piece.tensor.copy_(wide.tensor)

    def _mapped(self, kind: str, name: str, region: Region) -> torch.Tensor | None:
        return None if self._adapters_of(kind, name) else self.base._mapped(kind, name, region)

    def _adapters_of(self, kind: str, name: str) -> list[Adapter]:
        return [adapter for adapter in self.adapters if kind == WEIGHT and adapter.has(name)]

    def _check_fit(self, adapter: Adapter) -> None:
        """Raise CheckpointError unless both factors of each adapter fit a weight of the base."""
        shapes, where = adapter.reader.shapes, adapter.reader.checkpoint
        for kind, factor in shapes:
            layer = factor.removesuffix(f".{LORA_A}").removesuffix(f".{LORA_B}")
            if kind != WEIGHT or layer == factor:
                continue
            a, b, weight = (
                shapes.get((WEIGHT, f"{layer}.{LORA_A}")),
                shapes.get((WEIGHT, f"{layer}.{LORA_B}")),
                self.shapes.get((WEIGHT, f"{layer}.{WEIGHT}")),
            )
            if a is None or b is None or weight != (b[0], a[1]) or a[0] != b[1]:
                raise CheckpointError(
                    f"{layer} has factors {a} and {b} in {where} and weight {weight} in {self.checkpoint}: "
                    "the adapter is of another model"
                )


def _factors(weight: str) -> tuple[str, str]:
    """The names of A and B beside a weight."""
    layer = weight.removesuffix(f".{WEIGHT}")
    return f"{layer}.{LORA_A}", f"{layer}.{LORA_B}"
