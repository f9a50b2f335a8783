"""Megatron's distributed checkpoint, which is torch's with two files beside it, read and written.

iter_0000100/.metadata        the index: of each tensor its shape and dtype, and where its chunks lie
iter_0000100/__0_7.distcp     chunks one after another, each as torch.save writes it
iter_0000100/common.pt        Megatron's arguments and the iteration
iter_0000100/metadata.json    which form this is

Tensors are whole, whatever the layout. Those of equal layers are one stack of all layers, and those of
experts one of all experts (megatron-core, dist_checkpointing).
"""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import combinations, starmap
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megalite.checkpoint.format import CheckpointError, Shape
from megalite.checkpoint.megatron import Tensor
from megalite.checkpoint.megatron_classic import args_of
from megalite.checkpoint.megatron_layout import ExpertCut, Stage, has_equal_layers
from megalite.checkpoint.pickles import load_metadata, load_torch_bytes, load_torch_file
from megalite.config.model import ModelConfig
from megalite.files import sync, sync_folder

METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
STATE = "_extra_state"
MODEL_NAMES = ("embedding.", "decoder.", "output_layer.")

# In


class _Found(NamedTuple):
    """Where a tensor is: a key, and the entry of its first dimensions where it is a stack."""

    key: str
    entry: Shape


class DistributedFolder:
    """Whole tensors by key, in chunks; those of equal layers and of experts are stacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tp_size, self.ep_size, self.stage_layers = 1, 1, list[int]()
        metadata = load_metadata(path / METADATA)
        self.args = args_of(load_torch_file(path / COMMON)) if (path / COMMON).is_file() else None
        self._places = metadata.storage_data or {}
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(MODEL_NAMES)
        }
        self._read: set[_Found] = set()
        self._chunk = lru_cache(maxsize=2)(self._read_chunk)

    def shards(self, tensor: Tensor, _stage: Stage, _experts: ExpertCut) -> list[torch.Tensor]:
        found = self._find(tensor)
        self._read.add(found)
        return [self._read_entry(found)]

    def unread(self) -> Iterator[str]:
        num_read = Counter(found.key for found in self._read)
        depths = {found.key: len(found.entry) for found in self._read}
        for key, metadata in self._tensors.items():
            num_entries = prod(metadata.size[: depths.get(key, 0)])
            if num_read[key] < num_entries:
                yield f"{key} in {self.path}, of which {num_read[key]} of {num_entries} are known"

    def _find(self, tensor: Tensor) -> _Found:
        layer: Shape = () if tensor.layer is None else (tensor.layer,)
        for spelling in tensor.spellings:
            expert = () if tensor.expert is None or "{expert}" in spelling else (tensor.expert,)
            of_all_layers = spelling.replace("{layer}.", "")
            for key, entry in (
                (tensor.named(spelling), expert),
                (tensor.named(of_all_layers), layer + expert),
            ):
                if key in self._tensors and self._has(key, entry):
                    return _Found(key, entry)
        raise CheckpointError(f"{self.path} has no {tensor.named(tensor.spellings[0])}, which the model has")

    def _has(self, key: str, entry: Shape) -> bool:
        size = self._tensors[key].size
        return len(size) > len(entry) and all(a < b for a, b in zip(entry, size, strict=False))

    def _read_entry(self, found: _Found) -> torch.Tensor:
        """Copied out of the chunks that have a part of it."""
        entry, depth = found.entry, len(found.entry)
        full = torch.empty(0)
        for i, chunk in enumerate(self._chunks(found)):
            start, size = tuple(chunk.offsets), tuple(chunk.sizes)
            data = self._chunk(found.key, start, size)
            if i == 0:
                full = torch.empty(self._tensors[found.key].size[depth:], dtype=data.dtype)
            box = zip(start[depth:], size[depth:], strict=True)
            inner = tuple(i - a for i, a in zip(entry, start, strict=False))
            full[tuple(slice(a, a + n) for a, n in box)] = data[inner]
        return full

    def _chunks(self, found: _Found) -> list[ChunkStorageMetadata]:
        """Those that have a part of it. Raises CheckpointError unless they have each number once."""
        whole, depth = self._tensors[found.key].size, len(found.entry)
        chunks = [
            chunk
            for chunk in self._tensors[found.key].chunks
            if all(a <= i < a + n for i, a, n in zip(found.entry, chunk.offsets, chunk.sizes, strict=False))
        ]
        boxes = [[*zip(c.offsets[depth:], c.sizes[depth:], strict=True)] for c in chunks]
        for box in boxes:
            if any(a < 0 or a + n > size for (a, n), size in zip(box, whole[depth:], strict=True)):
                raise CheckpointError(
                    f"{self.path}: {found.key} has a chunk outside its shape {list(whole)}: get it again"
                )
        if any(starmap(_overlap, combinations(boxes, 2))):
            raise CheckpointError(f"{self.path}: {found.key} has chunks that overlap: get it again")
        num_numbers, num_filled = prod(whole[depth:]), sum(prod(n for _, n in box) for box in boxes)
        if num_filled != num_numbers:
            raise CheckpointError(
                f"{self.path}: {found.key} has {num_filled} of {num_numbers} numbers: get it again"
            )
        return chunks

    def _read_chunk(self, key: str, start: Shape, size: Shape) -> torch.Tensor:
        place = self._places.get(MetadataIndex(key, torch.Size(start)))
        if place is None or getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self.path}: {key} is compressed, or lies in no file: it is not read")
        file = self.path / place.relative_path
        try:
            with file.open("rb") as opened:
                opened.seek(place.offset)
                written = opened.read(place.length)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing, and {METADATA} names it: get it again") from None
        data = load_torch_bytes(written, file)
        if not isinstance(data, torch.Tensor) or tuple(data.shape) != size:
            raise CheckpointError(f"{file} does not hold {key} in the shape {list(size)} of {METADATA}")
        return data


def _overlap(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    """Whether two boxes, of start and size along each dimension, have a number in common."""
    return all(max(a, b) < min(a + n, b + m) for (a, n), (b, m) in zip(one, other, strict=True))


# Out


class Place(NamedTuple):
    """Where a distributed checkpoint has a tensor.

    key:    of a tensor, or of a stack.
    entry:  which entry of the stack, by layer, expert or both.
    counts: entries of the stack along these dimensions.
    """

    key: str
    entry: Shape = ()
    counts: Shape = ()

    @property
    def object_key(self) -> str:
        """Of an object in this place, which is no tensor."""
        entry, counts = self.entry or (0,), self.counts or (1,)
        return f"{self.key}/shard_{'.'.join(map(str, entry))}_{'.'.join(map(str, counts))}"


def place_of(tensor: Tensor, model: ModelConfig, *, local: bool) -> Place:
    """Where Megatron looks for a tensor, when it runs with its own layers or with transformer engine's."""
    spelling = tensor.stored_spelling(local=local)
    stacks: list[tuple[int, int]] = []
    if tensor.layer is not None and has_equal_layers(model):
        spelling = spelling.replace("{layer}.", "")
        stacks.append((tensor.layer, model.num_hidden_layers))
    if tensor.expert is not None:
        stacks.append((tensor.expert, model.n_routed_experts))
    return Place(tensor.named(spelling), tuple(i for i, _ in stacks), tuple(n for _, n in stacks))


def states_of(tensors: list[Tensor], model: ModelConfig, *, local: bool) -> list[Place]:
    """The places of the modules' states beside their weights, which Megatron asks for and which are empty.

    Of Megatron's own layers the linear ones have one. Of transformer engine's any may have, by its version;
    one that is not asked for does no harm.
    """
    stateful = re.compile(r"\.linear_\w+$" if local else r"\.(linear_\w+|\w*layernorm)$")
    found = dict[Place, None]()
    for tensor in tensors:
        place = place_of(tensor, model, local=local)
        module, _, weight = place.key.rpartition(".")
        if stateful.search(tensor.spelling(local=local).rpartition(".")[0]):
            found[place._replace(key=f"{module}.{STATE}")] = None
        if not local and (attention := module.removesuffix("linear_qkv")) != module and weight == "weight":
            found[place._replace(key=f"{attention}core_attention.{STATE}")] = None
    return list(found)


Entry = tuple[Place, Callable[[], torch.Tensor] | None]  # without a tensor: a module's empty state


def write_distributed(folder: Path, files: Iterable[Iterable[Entry]], common: dict[str, Any]) -> None:
    """Write and sync a checkpoint into an empty folder, a file for each list of entries.

    A tensor is read when its turn comes, and let go once it is written: memory is that of the largest.

    common: what is no tensor of the model.
    """
    index = Metadata({}, storage_data={}, version=CURRENT_DCP_VERSION)
    for number, entries in enumerate(files):
        name = f"__0_{number}.distcp"
        with (folder / name).open("wb") as file:
            for place, read in entries:
                _add(index, file, name, place, read)
            sync(file)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    for name, write in (
        (COMMON, lambda file: torch.save(common, file)),
        (METADATA, lambda file: pickle.dump(index, file)),
        (BACKEND, lambda file: file.write(json.dumps(backend).encode())),
    ):
        with (folder / name).open("wb") as file:
            write(file)
            sync(file)
    sync_folder(folder)


def _add(
    index: Metadata, file: IO[bytes], name: str, place: Place, read: Callable[[], torch.Tensor] | None
) -> None:
    """Write a tensor or an empty state at the end of a file, and note it in the index."""
    begin = file.tell()
    if read is None:
        torch.save([None], file)
        index.state_dict_metadata[place.object_key] = BytesStorageMetadata()
        where = MetadataIndex(place.object_key)
    else:
        tensor = read()
        chunk = tensor.view(*(1 for _ in place.entry), *tensor.shape)
        torch.save(chunk, file)
        start = torch.Size((*place.entry, *(0 for _ in tensor.shape)))
        whole = TensorStorageMetadata(
            TensorProperties(tensor.dtype), torch.Size((*place.counts, *tensor.shape)), []
        )
        noted = index.state_dict_metadata.setdefault(place.key, whole)
        assert isinstance(noted, TensorStorageMetadata)
        noted.chunks.append(ChunkStorageMetadata(start, chunk.shape))
        where = MetadataIndex(place.key, start)
    index.storage_data[where] = _StorageInfo(name, begin, file.tell() - begin)
