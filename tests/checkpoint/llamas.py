"""Tiny random Llamas, Qwens and Glm4Moes of transformers, and megalite checkpoints made of their weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
    "qwen2": {"attention_bias": True, "attention_out_bias": False, "tie_word_embeddings": True},
    "qwen2, wide heads": {"attention_bias": True, "attention_out_bias": False, "head_dim": 16},
    "qwen3": {"use_qk_norm": True, "head_dim": 16},
    "qwen3, biases": {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
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
EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 2.5,
}
EXPERT_VARIANTS: dict[str, dict[str, Any]] = {
    "experts": EXPERTS,
    "tied experts": EXPERTS | {"tie_word_embeddings": True, "n_shared_experts": 2, "head_dim": 16},
    "gates as they are": EXPERTS | {"norm_topk_prob": False, "first_k_dense_replace": 0},
    "one of two": EXPERTS | {"n_routed_experts": 2, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "head norms and biases": EXPERTS
    | {"use_qk_norm": True, "attention_bias": True, "attention_out_bias": False},
    "llama3 experts": EXPERTS | VARIANTS["llama3"],
}


def tiny_run(variant: str = "plain", **data: Any) -> RunConfig:
    """A run of a tiny model; without `data`, what a run that names none has in its config.yaml."""
    data = data or {"train": ["data/python"], "tokenizer": "bytes"}
    model = ModelConfig(**(TINY | (VARIANTS | EXPERT_VARIANTS)[variant]))
    return RunConfig.model_validate({"model": model.model_dump(), "data": data})


def random_llama(model: ModelConfig) -> Any:
    """Weights of size 1/sqrt(inputs), so that every part changes the logits; norms are not all ones.

    Selection biases are as large as the differences of the scores, so that they change choices.
    """
    torch.manual_seed(0)
    llama = (glm4_moe if model.n_routed_experts else plain_llama)(model).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
        for name, buffer in llama.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    return llama


# built the way transformers documents them, from their own field names, not from hf_config


def plain_llama(model: ModelConfig) -> Any:
    """A Llama, or what Qwen made of it."""
    own = {"rope_scaling", "rope_theta", "attention_out_bias", "use_qk_norm"}
    fields = model.model_dump(exclude=own) | {"rope_parameters": rope_parameters(model)}
    if model.use_qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**fields))
    if model.attention_out_bias != model.attention_bias:
        del fields["attention_bias"]
        return Qwen2ForCausalLM(Qwen2Config(**fields))
    return LlamaForCausalLM(LlamaConfig(**fields))


def glm4_moe(model: ModelConfig) -> Glm4MoeForCausalLM:
    others = {"rope_scaling", "rope_theta", "mlp_bias", "scoring_func", "router_aux_loss_coef"}
    others |= {"attention_out_bias"}
    rope = rope_parameters(model) | {"partial_rotary_factor": 1.0}
    fields = model.model_dump(exclude=others)
    return Glm4MoeForCausalLM(Glm4MoeConfig(**fields, rope_parameters=rope, num_mtp_layers=0))


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else {}
    return {"rope_type": "default", **scaling, "rope_theta": model.rope_theta}


def tensors_of(llama: Any) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors of a model of transformers, by (kind, name) as checkpoints have them."""
    tensors = {}
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight" and llama.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):  # gate above up, as Glm4MoeExperts chunks them
            for half, part in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                tensors["weight", name.replace("gate_up_proj", f"{half}.weight")] = part.clone()
        elif name.endswith("experts.down_proj"):
            tensors["weight", f"{name}.weight"] = tensor.clone()
        else:
            kind = "buffer" if name.endswith("e_score_correction_bias") else "weight"
            tensors[kind, name] = tensor.clone()
    return tensors


def save_llama(root: Path, llama: Any, run: RunConfig, step: int = 10) -> Path:
    """A checkpoint as four ranks (tp 2 x dp 2) would write it, moments included."""
    tensors = tensors_of(llama)
    moments = {
        ("exp_avg", name): torch.zeros_like(t) for (kind, name), t in tensors.items() if kind == "weight"
    }

    def cut_of(name: str, full: torch.Tensor) -> Cut:
        row_parallel = name.endswith(("o_proj.weight", "down_proj.weight"))
        dim = None if full.dim() == 1 else full.dim() - 2 + row_parallel
        return even_cut(dim, tp_size=2, dp_size=2)

    return save_world(root, step, cut_all(tensors | moments, cut_of), files={"config.yaml": dump_run(run)})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[2, 48, V] for fixed random tokens."""
    tokens = torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(1))
    return model(tokens).logits
