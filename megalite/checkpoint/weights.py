"""A model's tensors in a checkpoint and in a Hugging Face folder: which is which, and read out rounded."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from megalite.checkpoint.adapter import open_weights
from megalite.checkpoint.format import CONFIG, WIDEST_DTYPE, CheckpointError, Shape
from megalite.checkpoint.tensor_file import DTYPE_NAMES
from megalite.config.model import ModelConfig
from megalite.model.table import buffer_table, expert_names, model_table

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}  # float32, bfloat16, float16


class Part(NamedTuple):
    """One tensor of a Hugging Face folder, and where the checkpoint has it.

    name:    Hugging Face's.
    kind:    "weight", or "buffer": state that keeps float32 in every precision.
    tensor:  the checkpoint's name, the same but for stacks of experts.
    full_shape: of the checkpoint's tensor.
    entry:   which one along dimension 0 of a stack; None for the whole tensor.
    """

    name: str
    kind: str
    tensor: str
    full_shape: Shape
    entry: int | None = None

    @property
    def shape(self) -> Shape:
        """In the Hugging Face folder."""
        return self.full_shape if self.entry is None else self.full_shape[1:]

    @property
    def box(self) -> tuple[Shape, Shape]:
        """Start and shape of it in the checkpoint's tensor."""
        start = (0,) * len(self.full_shape)
        if self.entry is None:
            return start, self.full_shape
        return (self.entry, *start[1:]), (1, *self.full_shape[1:])

    def dtype_among(self, weights: torch.dtype) -> torch.dtype:
        """Its number format where weights have that one."""
        return weights if self.kind == "weight" else WIDEST_DTYPE


def model_parts(model: ModelConfig) -> Iterator[Part]:
    """The tensors of a model's Hugging Face folder, in the order of its layers, then the routers' biases."""
    for row in model_table(model):
        if row.kind != "expert":
            yield Part(row.name, "weight", row.name, row.shape)
            continue
        for entry, name in enumerate(expert_names(row.name, row.shape[0])):
            yield Part(name, "weight", row.name, row.shape, entry)
    for row in buffer_table(model):
        yield Part(row.name, "buffer", row.name, row.shape)


class Weights:
    """A model's weights and state in a checkpoint, read one Hugging Face tensor at a time, adapters merged.

    Args:
        checkpoint: the folder of a step.
        model: whose tensors they must be.
        dtype: to round weights to: a key of DTYPES.

    Attributes:
        parts: what can be read, by Hugging Face's names.
        reader: of the checkpoint's own tensors.

    Raises CheckpointError unless the checkpoint holds exactly the tensors of `model`.
    """

    def __init__(self, checkpoint: Path, model: ModelConfig, dtype: str = "float32") -> None:
        self.checkpoint, self.model, self.dtype = Path(checkpoint), model, dtype
        self.parts = {part.name: part for part in model_parts(model)}
        self.reader = open_weights(self.checkpoint)
        for kind in ("weight", "buffer"):
            self._check_shapes(kind)

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor is read as."""
        return self.parts[name].dtype_among(DTYPES[self.dtype])

    @property
    def size_bytes(self) -> int:
        """Of all tensors as they are read."""
        return sum(prod(part.shape) * self.dtype_of(name).itemsize for name, part in self.parts.items())

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor; of a stack of experts no more than this one is read.

        It may lie in a mapped file: clone it to keep it longer than the checkpoint.

        Raises CheckpointError when it holds a number that the dtype does not reach.
        """
        part, dtype = self.parts[name], self.dtype_of(name)
        rounded = self.reader.read_box(part.kind, part.tensor, *part.box, dtype).view(part.shape)
        if dtype != WIDEST_DTYPE and not all(extreme.isfinite() for extreme in rounded.aminmax()):
            self._check_reach(part, dtype)
        return rounded

    def _check_reach(self, part: Part, dtype: torch.dtype) -> None:
        """Raise CheckpointError where rounding made a finite number infinite."""
        full = self.reader.read_box(part.kind, part.tensor, *part.box)
        if full.to(dtype).isinf().sum() > full.isinf().sum():
            largest, limit = full[full.isfinite()].abs().max(), torch.finfo(dtype).max
            raise CheckpointError(
                f"weight {part.name} reaches {largest:.4g}, {dtype} ends at {limit:.4g}: use float32"
            )

    def _check_shapes(self, kind: str) -> None:
        expected = {part.tensor: part.full_shape for part in self.parts.values() if part.kind == kind}
        stored = self.reader.manifest.shapes(kind)
        for name in [*expected, *stored]:
            if stored.get(name) != expected.get(name):
                there, here = (list(s[name]) if name in s else "absent" for s in (stored, expected))
                where = self.reader.checkpoint
                raise CheckpointError(
                    f"{kind} {name} is {there} in {where} and {here} in the model of its {CONFIG}"
                )
