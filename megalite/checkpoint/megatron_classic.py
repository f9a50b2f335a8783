"""Megatron's classic checkpoint, one file per model-parallel rank, read and written.

iter_0000100/mp_rank_00/model_optim_rng.pt            tensor-parallel rank 0, of one stage
iter_0000100/mp_rank_00_001/model_optim_rng.pt        its stage 1; or of one stage, its expert-parallel rank 1
iter_0000100/mp_rank_00_001_003/model_optim_rng.pt    its stage 1, its expert-parallel rank 3

Which of the two a single further number counts, the files tell: an embedding is on the first stage alone.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.megatron import FIRST, Tensor
from megalite.checkpoint.megatron_layout import ExpertCut, Stage
from megalite.checkpoint.pickles import load_torch_file
from megalite.files import sync, sync_folder

RANK_FILE = "model_optim_rng.pt"


class Ranks(NamedTuple):
    """Whose file it is."""

    tp: int
    stage: int = 0
    expert: int = 0

    def folder_name(self, sizes: "Ranks") -> str:
        """sizes: of the three kinds of parallelism."""
        name = f"mp_rank_{self.tp:02d}" + f"_{self.stage:03d}" * (sizes.stage > 1)
        return name + f"_{self.expert:03d}" * (sizes.expert > 1)


class ClassicFolder:
    """One file per model-parallel rank, whose tensors are mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        numbered = _rank_files(path)
        state = load_torch_file(numbered[min(numbered)])
        self.args = args_of(state)
        self._check_readable(state)
        _check_all_there(path, numbered)
        states = {numbers: load_torch_file(file) for numbers, file in numbered.items()}
        models = {numbers: _model_of(state, numbered[numbers]) for numbers, state in states.items()}
        ranks = _ranks(models)
        self._files = {ranks[numbers]: file for numbers, file in numbered.items()}
        self._tensors = {ranks[numbers]: model for numbers, model in models.items()}
        self._read = {rank: set[str]() for rank in self._tensors}
        self.tp_size, self._pp_size, self.ep_size = (max(n) + 1 for n in zip(*self._tensors, strict=True))
        self._check_sizes()
        self.stage_layers = [self._num_layers(stage) for stage in range(self._pp_size)]

    def shards(self, tensor: Tensor, stage: Stage, experts: ExpertCut) -> list[torch.Tensor]:
        return [self._shard(tensor, tp_rank, stage, experts) for tp_rank in range(self.tp_size)]

    def unread(self) -> Iterator[str]:
        for ranks, tensors in self._tensors.items():
            yield from (
                f"{name} in {self._files[ranks]}" for name in sorted(tensors.keys() - self._read[ranks])
            )

    def _shard(self, tensor: Tensor, tp_rank: int, stage: Stage, experts: ExpertCut) -> torch.Tensor:
        """Of an expert, from the rank that has it; of anything else, which all must have alike."""
        rank, local = experts.place(tensor.expert)
        if rank is not None:
            return self._read_one(tensor, Ranks(tp_rank, stage.rank, rank), stage.first_layer, local)
        first, *others = (
            self._read_one(tensor, Ranks(tp_rank, stage.rank, rank), stage.first_layer)
            for rank in range(self.ep_size)
        )
        if not all(other.equal(first) for other in others):
            name = tensor.named(tensor.spellings[0])
            raise CheckpointError(
                f"{self.path}: {name} differs among expert-parallel ranks, which hold it alike"
            )
        return first

    def _read_one(
        self, tensor: Tensor, ranks: Ranks, first_layer: int, expert: int | None = None
    ) -> torch.Tensor:
        names = [tensor.named(spelling, first_layer, expert) for spelling in tensor.spellings]
        for name in names:
            if name in self._tensors[ranks]:
                self._read[ranks].add(name)
                return self._tensors[ranks][name]
        raise CheckpointError(f"{self._files[ranks]} has no {' or '.join(names[:2])}, which the model has")

    def _num_layers(self, stage: int) -> int:
        found = (re.match(r"decoder\.layers\.(\d+)\.", name) for name in self._tensors[Ranks(0, stage)])
        return len({match[1] for match in found if match})

    def _check_readable(self, state: dict[str, Any]) -> None:
        """What the arguments say of files that are not read at all."""
        args = self.args or {}
        if (size := args.get("virtual_pipeline_model_parallel_size") or 1) > 1:
            raise CheckpointError(
                f"{self.path}: virtual_pipeline_model_parallel_size is {size}, which is not read from files "
                "per rank: let Megatron save it with --ckpt-format torch_dist"
            )
        tp_size = args.get("tensor_model_parallel_size")
        experts_tp = args.get("expert_tensor_parallel_size") or tp_size
        if args.get("num_experts") and tp_size and experts_tp != tp_size:
            raise CheckpointError(
                f"{self.path}: expert_tensor_parallel_size is {experts_tp} and tensor_model_parallel_size "
                f"{tp_size}, which is not read from files per rank: let Megatron save it with "
                "--ckpt-format torch_dist"
            )
        if state.get("checkpoint_version", 3.0) < 3:
            raise CheckpointError(
                f"{self.path} has checkpoint version {state['checkpoint_version']}, where query, key and "
                "value lie in another order: let Megatron save it again"
            )

    def _check_sizes(self) -> None:
        """What the arguments say of the layout, against the files."""
        found = {
            "tensor_model_parallel_size": self.tp_size,
            "pipeline_model_parallel_size": self._pp_size,
            "expert_model_parallel_size": self.ep_size,
        }
        for name, size in found.items():
            if (told := (self.args or {}).get(name, size)) != size:
                raise CheckpointError(
                    f"{self.path}: {name} was {told} and there are files of {size}: add the others"
                )


Numbers = tuple[int, ...]  # in the name of a rank's folder


def _rank_files(path: Path) -> dict[Numbers, Path]:
    files = {}
    for folder in path.glob("mp_rank_*"):
        match = re.fullmatch(r"mp_rank_(\d+)((?:_\d+){0,2})", folder.name)
        if not match:
            raise CheckpointError(
                f"{folder} is no rank's folder: expected mp_rank_TT, and _PPP and _EEE behind it if any"
            )
        numbers = int(match[1]), *(int(number) for number in match[2].split("_")[1:])
        files[numbers] = folder / RANK_FILE
    first = files[min(files)]
    if not first.is_file():
        raise CheckpointError(f"{first} is missing: get it again")
    return files


def _check_all_there(path: Path, files: dict[Numbers, Path]) -> None:
    lengths = {len(numbers) for numbers in files}
    if len(lengths) > 1:
        raise CheckpointError(
            f"{path} has files of several layouts, with {' and '.join(map(str, sorted(lengths)))} numbers in "
            "their names: keep those of one"
        )
    for numbers in product(*(range(max(n) + 1) for n in zip(*files, strict=True))):
        if numbers not in files or not files[numbers].is_file():
            name = "_".join(f"{number:0{2 + (i > 0)}d}" for i, number in enumerate(numbers))
            raise CheckpointError(
                f"{path} has no mp_rank_{name}/{RANK_FILE}, and it has others: get it again"
            )


def _ranks(models: dict[Numbers, dict[str, torch.Tensor]]) -> dict[Numbers, Ranks]:
    """Who the numbers stand for."""
    of_experts = FIRST.engine in models.get((0, 1), {})
    return {
        numbers: Ranks(numbers[0], expert=numbers[1]) if of_experts else Ranks(*numbers) for numbers in models
    }


def args_of(state: Any) -> dict[str, Any] | None:
    """Megatron's arguments in what was read of a file, if there are any."""
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


def write_rank(folder: Path, state: dict[str, Any]) -> None:
    """Write and sync a rank's file, in a new folder."""
    folder.mkdir(parents=True)
    with (folder / RANK_FILE).open("wb") as file:
        torch.save(state, file)
        sync(file)
    sync_folder(folder)
