"""Weights that lie in foreign folders, read as a checkpoint's are: any part, rounded, with adapters merged.

A foreign tensor is one whole piece, or one entry of a stack of experts, as if one rank had written it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megalite.checkpoint.adapter import WEIGHT, Adapter, MergedReader, is_adapter
from megalite.checkpoint.format import CheckpointError, Manifest, PieceRow, Region, TensorEntry
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.load import TensorReader
from megalite.checkpoint.peft_folder import PeftFolder
from megalite.checkpoint.weights import Part, model_parts
from megalite.parallel.lora import LORA_A

FILE = "tensors"  # the one file that all pieces are in, to the reader


class ForeignReader(TensorReader):
    """Reads mapped tensors as if they were pieces of a checkpoint.

    where: the folder, for messages. parts: which piece of which of our tensors each foreign one is.
    tensors: by the parts' names.
    """

    def __init__(self, where: Path, parts: Iterable[Part], tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._rows: dict[tuple[str, str], list[PieceRow]] = {}
        for part in parts:
            start, shape = part.box
            region = Region(start, shape, 0, torch.Size(shape).numel())
            row = PieceRow(part.name, part.kind, part.tensor, part.full_shape, region)
            self._rows.setdefault((part.kind, part.tensor), []).append(row)
        super().__init__(where, Manifest(step=0, world_size=1, files={}, tensors=list(self._entries())))

    def _entries(self) -> Iterable[TensorEntry]:
        for (kind, name), rows in self._rows.items():
            shape = rows[0].full_shape
            size = torch.Size(shape).numel()
            yield TensorEntry(kind=kind, name=name, full_shape=shape, num_elements=size)

    def _nearest_files(self, rank: int) -> list[str]:
        return [FILE]

    def _table(self, file: str) -> dict[tuple[str, str], list[PieceRow]]:
        return self._rows

    def _source(self, file: str) -> Mapping[str, torch.Tensor]:
        return self._tensors


def read_folder(folder: HFFolder) -> ForeignReader:
    """A reader of a Hugging Face folder. Raises CheckpointError unless it holds just its model's tensors."""
    parts = list(model_parts(folder.model))
    folder.check(parts)
    return ForeignReader(folder.path, parts, folder.tensors)


def merge_folder(base: TensorReader, folder: PeftFolder) -> MergedReader:
    """A reader of a base's weights as an adapter of PEFT's changes them.

    Raises CheckpointError unless all that is in the adapter belongs beside weights of the base.
    """
    for name, tensor in folder.tensors.items():
        rank = tensor.shape[0 if name.endswith(LORA_A) else -1] if is_adapter(name) else None
        if rank != folder.lora.rank:
            raise CheckpointError(
                f"{folder.path}: {name} has shape {list(tensor.shape)}, which is no factor of rank "
                f"{folder.lora.rank}: merge that adapter into its model with PEFT, and use the model"
            )
    parts = [Part(name, WEIGHT, name, tuple(tensor.shape)) for name, tensor in folder.tensors.items()]
    reader = ForeignReader(folder.path, parts, folder.tensors)
    return MergedReader(base, [Adapter(reader, folder.lora.scale)])
