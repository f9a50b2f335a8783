"""The model of a checkpoint in memory: megalite's own, whole or a rank's part, or transformers'."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalite.batch import Batch
from megalite.checkpoint.adapter import open_weights
from megalite.checkpoint.agreement import Gather, alone, on_all_ranks
from megalite.checkpoint.format import CheckpointError, Piece
from megalite.checkpoint.hf_config import hf_config
from megalite.checkpoint.load import TensorReader, load_pieces, read_config, require_checkpoint
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage
from megalite.parallel.draws import Box
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import spec_of, state_buffers


@torch.no_grad()
def build_megalite_model(weights: Weights) -> LlamaStage:
    """megalite's own model, which computes in float32 with the weights as they were rounded."""
    stage = LlamaStage(weights.model, LayerPlan(dtype=torch.float32)).eval()
    tensors = {spec_of(tensor).name: tensor for tensor in [*stage.parameters(), *state_buffers(stage)]}
    for tensor in tensors.values():
        tensor.zero_()  # the vocabulary's padding stays so
    for name, part in weights.parts.items():
        box = tuple(slice(start, start + size) for start, size in zip(*part.box, strict=True))
        tensors[part.tensor][box] = weights.read(name)
    return stage


@torch.no_grad()
def megalite_logits(stage: LlamaStage, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, V] of token ids [b, s], by a model in one process."""
    return stage(None, Batch(tokens)).transpose(0, 1)[..., : stage.config.vocab_size]


def load_stage(
    checkpoint: Path,
    model: ModelConfig,
    plan: LayerPlan,
    gather: Gather = alone,
    open_reader: Callable[[Path], TensorReader] = open_weights,
) -> LlamaStage:
    """This rank's part of a checkpoint's model, for evaluation, on the device and in the dtype of the plan.

    No more than this part is read or held; adapters are merged into it.

    gather: by which all ranks of the plan load together.
    open_reader: what reads `checkpoint`, which may be another folder of weights then.

    Raises CheckpointError, on all ranks, when the model does not fit the checkpoint, or a weight the dtype.
    """
    stage = LlamaStage(model, replace(plan, init=_to_be_filled)).eval()
    kinds = {"weight": stage.parameters(), "buffer": state_buffers(stage)}
    pieces = [
        Piece.of(spec_of(tensor), kind, tensor.detach().view(-1))
        for kind, tensors in kinds.items()
        for tensor in tensors
    ]
    load_pieces(
        checkpoint,
        pieces,
        rank=plan.context.rank,
        gather=gather,
        ignore_other_kinds=True,
        open_reader=open_reader,
    )
    on_all_ranks(gather, lambda: _check_range(pieces))
    return stage.to(plan.context.device)


def _to_be_filled(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
    """Zeros of this rank's part."""
    return torch.zeros([part.stop - part.start for part in box] if box else full_shape)


def _check_range(pieces: Sequence[Piece]) -> None:
    """Raise CheckpointError where rounding left an infinite number."""
    for piece in pieces:
        if piece.tensor.isinf().any():
            raise CheckpointError(
                f"{piece.kind} {piece.name} reaches beyond {piece.tensor.dtype}: use float32"
            )


def build_transformers_model(weights: Weights) -> Any:
    """transformers' model in the dtype of the weights, without a file in between.

    Raises CheckpointError for a model that transformers has no class for.
    """
    import transformers

    fields = hf_config(weights.model, weights.dtype)
    model_class: Any = getattr(transformers, fields["architectures"][0])
    config = model_class.config_class.from_dict(fields)
    state = {name: weights.read(name).clone() for name in weights.parts}
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=DTYPES[weights.dtype])


def read_transformers_model(folder: Path, dtype: str) -> Any:
    """transformers' model of a Hugging Face folder. Nothing in the folder is executed, and nothing fetched.

    dtype: to round weights to: a key of DTYPES.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)


def load(
    checkpoint: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Any:
    """transformers' model with the weights of a checkpoint, to be called and to `generate`.

    Args:
        checkpoint: RUN_DIR, its checkpoints, or one step's folder; of several the newest valid one.
        dtype: of the weights: float32, bfloat16 or float16.
        device: where they are to be.

    Returns LlamaForCausalLM, or the class that transformers has for what the model holds besides.
    Raises CheckpointError for a path without a valid checkpoint, a model that transformers has no class
    for, or a dtype that a weight does not fit into.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name} is not one of {', '.join(DTYPES)}")
    found = require_checkpoint(Path(checkpoint), warnings.warn)
    return build_transformers_model(Weights(found, read_config(found).model, name)).to(device)
