"""A checkpoint of Megatron, found and read: one file per model-parallel rank, or torch's distributed form.

iter_0000100/mp_rank_00_001/model_optim_rng.pt    the classic form: tensor-parallel rank 0, stage 1
iter_0000100/.metadata, __0_0.distcp, common.pt   the distributed form, whose tensors are whole
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.megatron import Tensor
from megalite.checkpoint.megatron_classic import RANK_FILE, ClassicFolder
from megalite.checkpoint.megatron_distributed import METADATA, DistributedFolder
from megalite.checkpoint.megatron_layout import ExpertCut, Stage

LATEST = "latest_checkpointed_iteration.txt"


class MegatronFolder(Protocol):
    """A model's tensors, as Megatron's ranks held them.

    Attributes:
        path: of the iteration.
        args: Megatron's arguments, None where there are none.
        tp_size, ep_size: ranks that a tensor is cut for, and that experts are shared out among.
        stage_layers: number of decoder layers of each pipeline stage; empty for one stage of all.
    """

    path: Path
    args: dict[str, Any] | None
    tp_size: int
    ep_size: int
    stage_layers: list[int]

    def shards(self, tensor: Tensor, stage: Stage, experts: ExpertCut) -> list[torch.Tensor]:
        """Of each tensor-parallel rank.

        Raises CheckpointError when one has none, or when ranks that hold the same hold it differently.
        """
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
