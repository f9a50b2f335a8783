"""What can be compared: the tensors of a checkpoint, and the weights of a Hugging Face folder."""

from math import prod
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.adapter import open_weights
from megalite.checkpoint.format import CONFIG, CheckpointError, Shape
from megalite.checkpoint.hf_folder import CONFIG_FILE, HFFolder
from megalite.checkpoint.load import TensorReader
from megalite.checkpoint.weights import Part, model_parts
from megalite.config.dialect import read_yaml
from megalite.inspection.blocks import KEPT_BYTES, MODEL_KINDS, BlockReader, Key, Range
from megalite.inspection.contents import DEEPSPEED
from megalite.inspection.inventory import Item, read_record
from megalite.inspection.table import Facts


class HFTensors:
    """A Hugging Face folder's weights and buffers, by the names that checkpoints have for them.

    dtypes: that they are stored in.

    Raises CheckpointError when the folder does not hold the tensors of its model.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._num_bytes = path, 0
        self._folder = HFFolder(path)
        self._parts: dict[Key, list[Part]] = {}
        for part in model_parts(self._folder.model):
            self._parts.setdefault((part.kind, part.tensor), []).append(part)
        self._folder.check(part for parts in self._parts.values() for part in parts)
        self.shapes: dict[Key, Shape] = {key: parts[0].full_shape for key, parts in self._parts.items()}
        tensors = self._folder.tensors
        self.dtypes = {key: tensors[parts[0].name].dtype for key, parts in self._parts.items()}

    def read(self, key: Key, where: Range) -> torch.Tensor:
        """float32 [size], of as many experts of a stack as it lies in."""
        flat, parts = torch.empty(where.size), self._parts[key]
        size, end = prod(parts[0].shape), where.start + where.size
        for number in range(where.start // size, -(-end // size)):
            low, high = max(where.start, number * size), min(end, (number + 1) * size)
            tensor = self._folder.tensors[parts[number].name].reshape(-1)
            flat[low - where.start : high - where.start] = tensor[low - number * size : high - number * size]
        self._num_bytes += flat.nbytes
        if self._num_bytes > KEPT_BYTES:
            self._folder, self._num_bytes = HFFolder(self.path), 0  # what was read leaves the memory
        return flat


class RoundedReader(BlockReader):
    """Those tensors of a checkpoint that a Hugging Face folder could have, rounded as they are there."""

    def __init__(self, reader: TensorReader, dtypes: dict[Key, torch.dtype]) -> None:
        super().__init__(reader)
        self.shapes = {key: shape for key, shape in reader.shapes.items() if key[0] in MODEL_KINDS}
        self._dtypes = dtypes

    def read(self, key: Key, where: Range) -> torch.Tensor:
        return super().read(key, where).to(self._dtypes[key]).float()


def is_hf_folder(path: Path) -> bool:
    """Whether there is a Hugging Face model at `path`."""
    return (path / CONFIG_FILE).is_file()


def open_pair(a: Item, b: Item | Path) -> tuple[BlockReader, BlockReader | HFTensors]:
    """The tensors of both; b: a checkpoint, or a Hugging Face folder, to whose dtypes those of a are rounded.

    Raises CheckpointError when both have no tensor of one name, kind and shape.
    """
    if isinstance(b, Item):
        pair: Any = BlockReader(TensorReader(a.folder)), BlockReader(TensorReader(b.folder))
        where = b.folder
    else:
        there, where = HFTensors(b), b
        pair = RoundedReader(open_weights(a.folder), there.dtypes), there
    first, second = pair
    if not first.shapes.items() & second.shapes.items():
        raise CheckpointError(
            f"{a.folder} has {len(first.shapes)} tensors and {where} {len(second.shapes)}, none of one kind, "
            "name and shape: compare checkpoints of one model"
        )
    return first, second


def records_of(item: Item) -> dict[str, Facts]:
    """What a checkpoint says besides its tensors, by the name of the file."""
    manifest = item.manifest
    assert manifest is not None, "only valid checkpoints are compared"
    config: Facts = {}
    if CONFIG in manifest.files:
        path = item.folder / CONFIG
        config = read_yaml(path.read_text(encoding="utf-8"), str(path))
    deepspeed = read_record(item.folder / DEEPSPEED) if DEEPSPEED in manifest.files else {}
    return {"state.json": item.state, CONFIG: config, DEEPSPEED: deepspeed}
