"""The model of a checkpoint in the memory of one process: megalite's own, or transformers'."""

from typing import Any

import torch

from megalite.batch import Batch
from megalite.checkpoint.hf import hf_config
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.model.llama import LlamaStage
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import spec_of


@torch.no_grad()
def build_megalite_model(weights: Weights) -> LlamaStage:
    """megalite's own model, which computes in float32 with the weights as they were rounded."""
    stage = LlamaStage(weights.model, LayerPlan(dtype=torch.float32)).eval()
    for parameter in stage.parameters():
        spec = spec_of(parameter)
        parameter.copy_(spec.cut(weights.read(spec.name)))
    return stage


@torch.no_grad()
def megalite_logits(stage: LlamaStage, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, V] of token ids [b, s], by a model in one process."""
    return stage(None, Batch(tokens)).transpose(0, 1)[..., : stage.config.vocab_size]


def build_transformers_model(weights: Weights) -> Any:
    """A `transformers.LlamaForCausalLM` in the dtype of the weights, without a file in between."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = {name: weights.read(name) for name in weights.shapes}
    config = LlamaConfig.from_dict(hf_config(weights.model, weights.dtype))
    return LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=DTYPES[weights.dtype]
    )
