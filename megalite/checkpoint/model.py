"""The model of a checkpoint in the memory of one process: megalite's own, or transformers'."""

from pathlib import Path
from typing import Any

import torch

from megalite.batch import Batch
from megalite.checkpoint.hf_config import hf_config
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.model.llama import LlamaStage
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


def build_transformers_model(weights: Weights) -> Any:
    """transformers' model in the dtype of the weights, without a file in between.

    Raises CheckpointError for a model that transformers has no class for.
    """
    import transformers

    fields = hf_config(weights.model, weights.dtype)
    model_class: Any = getattr(transformers, fields["architectures"][0])
    config = model_class.config_class.from_dict(fields)
    state = {name: weights.read(name) for name in weights.parts}
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=DTYPES[weights.dtype])


def read_transformers_model(folder: Path, dtype: str) -> Any:
    """transformers' model of a Hugging Face folder. Nothing in the folder is executed, and nothing fetched.

    dtype: to round weights to: a key of DTYPES.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)
