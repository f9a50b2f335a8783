"""A checkpoint of Megatron, read: one file per model-parallel rank, or torch's distributed form.

iter_0000100/mp_rank_00_001/model_optim_rng.pt    the classic form: tensor-parallel rank 0, stage 1
iter_0000100/.metadata, __0_0.distcp, common.pt   the distributed form, whose tensors are whole
"""

import io
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megalite.checkpoint.format import CheckpointError, Shape
from megalite.checkpoint.megatron import Tensor
from megalite.checkpoint.pickles import DAMAGE, damaged, load_metadata, load_torch_file

LATEST, RANK_FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
METADATA, COMMON = ".metadata", "common.pt"
MODEL_NAMES = ("embedding.", "decoder.", "output_layer.")


class MegatronFolder(Protocol):
    """A model's tensors, as Megatron's ranks held them.

    Attributes:
        path: of the iteration.
        args: Megatron's arguments, None where there are none.
        tp_size: ranks that a tensor is cut for.
        stage_layers: number of decoder layers of each pipeline stage; empty for one stage of all.
    """

    path: Path
    args: dict[str, Any] | None
    tp_size: int
    stage_layers: list[int]

    def shards(self, tensor: Tensor, stage: int, first_layer: int) -> list[torch.Tensor]:
        """Of each tensor-parallel rank. Raises CheckpointError when one has none."""
        ...

    def unread(self) -> Iterator[str]:
        """The model's tensors that were never asked for."""
        ...


def open_megatron(path: Path) -> MegatronFolder:
    """A checkpoint of Megatron: the folder of one iteration, or the one above, of which the latest is taken.

    Raises CheckpointError, in one line, when it is neither form, or a file is missing or damaged.
    """
    folder = _iteration(Path(path))
    if (folder / METADATA).is_file():
        return DistributedFolder(folder)
    if any(folder.glob("mp_rank_*")):
        return ClassicFolder(folder)
    raise CheckpointError(
        f"{folder} is no checkpoint of Megatron: neither mp_rank_00/{RANK_FILE} nor {METADATA} is there"
    )


def _iteration(path: Path) -> Path:
    latest = path / LATEST
    if not latest.is_file():
        return path
    text = latest.read_text(encoding="utf-8").strip()
    folder = path / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not text or not folder.is_dir():
        raise CheckpointError(f"{latest} says {text!r} and {folder} is not there")
    return folder


# The classic form


class ClassicFolder:
    """One file per model-parallel rank, whose tensors are mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = _rank_files(path)
        self.tp_size, self._pp_size = (max(ranks) + 1 for ranks in zip(*files, strict=True))
        _check_all_there(path, files, self.tp_size, self._pp_size)
        states = {ranks: load_torch_file(file) for ranks, file in files.items()}
        self.args = _args_of(states[0, 0])
        self._check_sizes(states[0, 0])
        self._tensors = {ranks: _model_of(state, files[ranks]) for ranks, state in states.items()}
        self._files, self._read = files, {ranks: set[str]() for ranks in files}
        self.stage_layers = [self._num_layers(stage) for stage in range(self._pp_size)]

    def shards(self, tensor: Tensor, stage: int, first_layer: int) -> list[torch.Tensor]:
        return [self._shard(tensor, (rank, stage), first_layer) for rank in range(self.tp_size)]

    def unread(self) -> Iterator[str]:
        for ranks, tensors in self._tensors.items():
            yield from (
                f"{name} in {self._files[ranks]}" for name in sorted(tensors.keys() - self._read[ranks])
            )

    def _shard(self, tensor: Tensor, ranks: tuple[int, int], first_layer: int) -> torch.Tensor:
        names = [tensor.named(spelling, first_layer) for spelling in tensor.spellings]
        for name in names:
            if name in self._tensors[ranks]:
                self._read[ranks].add(name)
                return self._tensors[ranks][name]
        raise CheckpointError(f"{self._files[ranks]} has no {' or '.join(names[:2])}, which the model has")

    def _num_layers(self, stage: int) -> int:
        found = (re.match(r"decoder\.layers\.(\d+)\.", name) for name in self._tensors[0, stage])
        return len({match[1] for match in found if match})

    def _check_sizes(self, state: dict[str, Any]) -> None:
        """What the arguments say of the layout."""
        args = self.args or {}
        for name in ("expert_model_parallel_size", "virtual_pipeline_model_parallel_size"):
            if (args.get(name) or 1) > 1:
                raise CheckpointError(
                    f"{self.path}: {name} is {args[name]}, which is not read from files per rank: "
                    "let Megatron save it with --ckpt-format torch_dist"
                )
        experts_tp = args.get("expert_tensor_parallel_size") or self.tp_size
        if args.get("num_experts") and experts_tp != self.tp_size:
            raise CheckpointError(
                f"{self.path}: expert_tensor_parallel_size is {experts_tp} and there are files of "
                f"{self.tp_size} tensor-parallel ranks: let Megatron save it with --ckpt-format torch_dist"
            )
        found = {"tensor_model_parallel_size": self.tp_size, "pipeline_model_parallel_size": self._pp_size}
        for name, size in found.items():
            if args.get(name, size) != size:
                raise CheckpointError(
                    f"{self.path}: {name} was {args[name]} and there are files of {size}: add the others"
                )
        if state.get("checkpoint_version", 3.0) < 3:
            raise CheckpointError(
                f"{self.path} has checkpoint version {state['checkpoint_version']}, where query, key and "
                "value lie in another order: let Megatron save it again"
            )


def _rank_files(path: Path) -> dict[tuple[int, int], Path]:
    files = {}
    for folder in path.glob("mp_rank_*"):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", folder.name)
        if not match:
            raise CheckpointError(
                f"{folder} is of expert parallelism, which is not read from files per rank: "
                "let Megatron save it with --ckpt-format torch_dist"
            )
        files[int(match[1]), int(match[2] or 0)] = folder / RANK_FILE
    return files


def _check_all_there(path: Path, files: dict[tuple[int, int], Path], tp_size: int, pp_size: int) -> None:
    for tp_rank, pp_rank in product(range(tp_size), range(pp_size)):
        file = files.get((tp_rank, pp_rank))
        if file is None or not file.is_file():
            raise CheckpointError(
                f"{path} has no {RANK_FILE} of tensor-parallel rank {tp_rank}, stage {pp_rank}, and it has "
                "others: get it again"
            )


def _args_of(state: Any) -> dict[str, Any] | None:
    args = state.get("args") if isinstance(state, dict) else None
    return vars(args) if isinstance(args, Namespace) else None


def _model_of(state: Any, file: Path) -> dict[str, torch.Tensor]:
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        virtual = ": it is of several virtual stages, which are not read" * ("model0" in (state or ()))
        raise CheckpointError(f"{file} has no model{virtual}")
    return {
        name: tensor
        for name, tensor in model.items()
        if isinstance(tensor, torch.Tensor) and "_extra_state" not in name
    }


# The distributed form


class _Found(NamedTuple):
    """Where a tensor is: a key, and the entry of its first dimensions where it is a stack."""

    key: str
    entry: Shape


class DistributedFolder:
    """Whole tensors by key, in chunks; those of equal layers and of experts are stacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tp_size, self.stage_layers = 1, list[int]()
        metadata = load_metadata(path / METADATA)
        self.args = _args_of(load_torch_file(path / COMMON)) if (path / COMMON).is_file() else None
        self._places = metadata.storage_data or {}
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(MODEL_NAMES)
        }
        self._read: set[_Found] = set()
        self._chunk = lru_cache(maxsize=2)(self._read_chunk)

    def shards(self, tensor: Tensor, stage: int, first_layer: int) -> list[torch.Tensor]:
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
        layer = () if tensor.layer is None else (tensor.layer,)
        for spelling in tensor.spellings:
            stacked = "{expert}" in tensor.row.ours and spelling.endswith(tensor.row.stored)
            expert = (tensor.expert,) if stacked and tensor.expert is not None else ()
            for key, entry in (
                (tensor.named(spelling), expert),
                (spelling.replace("{layer}.", ""), layer + expert),
            ):
                if key in self._tensors and self._has(key, entry):
                    return _Found(key, entry)
        raise CheckpointError(f"{self.path} has no {tensor.named(tensor.spellings[0])}, which the model has")

    def _has(self, key: str, entry: Shape) -> bool:
        size = self._tensors[key].size
        return len(size) > len(entry) and all(a < b for a, b in zip(entry, size, strict=False))

    def _read_entry(self, found: _Found) -> torch.Tensor:
        """Copied out of the chunks that have a part of it."""
        metadata, entry = self._tensors[found.key], found.entry
        depth, shape = len(entry), tuple(metadata.size[len(entry) :])
        full, num_filled = torch.empty(0), 0
        for chunk in metadata.chunks:
            start, size = chunk.offsets, chunk.sizes
            if not all(a <= i < a + n for i, a, n in zip(entry, start, size, strict=False)):
                continue
            data = self._chunk(found.key, tuple(start), tuple(size))
            if not num_filled:
                full = torch.empty(shape, dtype=data.dtype)
            data = data[tuple(i - a for i, a in zip(entry, start, strict=False))]
            box = zip(start[depth:], size[depth:], strict=True)
            full[tuple(slice(a, a + n) for a, n in box)] = data
            num_filled += data.numel()
        if num_filled != prod(shape):
            raise CheckpointError(f"{self.path}: {found.key} has {num_filled} of {prod(shape)} numbers")
        return full

    def _read_chunk(self, key: str, start: Shape, size: Shape) -> torch.Tensor:
        place = self._places.get(MetadataIndex(key, torch.Size(start)))
        if place is None or getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self.path}: {key} is compressed, or lies in no file: it is not read")
        file = self.path / place.relative_path
        try:
            with file.open("rb") as opened:
                opened.seek(place.offset)
                data = torch.load(
                    io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True
                )
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing, and {METADATA} names it: get it again") from None
        except DAMAGE as error:
            raise damaged(file, error) from None
        if not isinstance(data, torch.Tensor) or tuple(data.shape) != size:
            raise CheckpointError(f"{file} does not hold {key} in the shape {list(size)} of {METADATA}")
        return data
