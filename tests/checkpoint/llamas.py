"""Tiny random Llamas of transformers, and megalite checkpoints made of their weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalite.config.load import dump_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from tests.checkpoint.worlds import Cut, cut_all, even_cut, save_world

TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
    "linear": {"rope_theta": 50000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 50000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def tiny_run(variant: str = "plain", **data: Any) -> RunConfig:
    """A run of a tiny model; without `data`, what a run that names none has in its config.yaml."""
    data = data or {"train": ["data/python"], "tokenizer": "bytes"}
    model = ModelConfig(**(TINY | VARIANTS[variant]))
    return RunConfig.model_validate({"model": model.model_dump(), "data": data})


def random_llama(model: ModelConfig) -> LlamaForCausalLM:
    """Weights of size 1/sqrt(inputs), so that every part changes the logits; norms are not all ones."""
    # built the way transformers documents it, from its own field names, not from hf_config
    rope = {
        "rope_type": "default",
        **(model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else {}),
    }
    fields = model.model_dump(exclude={"rope_scaling", "rope_theta"})
    config = LlamaConfig(**fields, rope_parameters={**rope, "rope_theta": model.rope_theta})
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return llama


def save_llama(root: Path, llama: LlamaForCausalLM, run: RunConfig, step: int = 10) -> Path:
    """A checkpoint as four ranks (tp 2 x dp 2) would write it, moments included."""
    weights = dict(llama.state_dict())
    if run.model.tie_word_embeddings:
        del weights["lm_head.weight"]
    tensors = {("weight", name): tensor.clone() for name, tensor in weights.items()}
    tensors |= {("exp_avg", name): torch.zeros_like(tensor) for name, tensor in weights.items()}

    def cut_of(name: str, full: torch.Tensor) -> Cut:
        row_parallel = name.endswith(("o_proj.weight", "down_proj.weight"))
        return even_cut(None if full.dim() == 1 else int(row_parallel), tp_size=2, dp_size=2)

    return save_world(root, step, cut_all(tensors, cut_of), files={"config.yaml": dump_run(run)})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[2, 48, V] for fixed random tokens."""
    tokens = torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(1))
    return model(tokens).logits
