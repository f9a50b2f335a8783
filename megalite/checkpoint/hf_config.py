"""A model's config.json, to it and from it, by one description of each of transformers' classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from megalite.checkpoint.format import CheckpointError
from megalite.config.model import ModelConfig
from megalite.config.section import explain

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_WINDOW = 4096  # of transformers, where a class attends to a window


@dataclass(frozen=True)
class Architecture:
    """One of transformers' classes; keys that are ModelConfig's fields too mean the same there.

    Attributes:
        name, model_type: the class, and what config.json calls its family.
        optional: fields of config.json besides SIZES, with what transformers takes for an absent one.
        sizes: further fields that config.json must have.
        always: fields of ModelConfig that config.json does not state, with the only value that the class has.
        computed: keys with the only value that both compute, which is transformers' default too.
        written: keys that are written with this value and not read: they do not change the logits, or are
            looked at by themselves.
        window: whether attention ends at sliding_window: never, always, or where use_sliding_window says so.
        rotary_share: what transformers takes for an absent partial_rotary_factor; megalite computes 1.
    """

    name: str
    model_type: str
    optional: Mapping[str, Any]
    sizes: tuple[str, ...] = ()
    always: Mapping[str, Any] = field(default_factory=dict)
    computed: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    window: Literal["never", "always", "switched"] = "never"
    rotary_share: float = 1.0

    @property
    def required(self) -> tuple[str, ...]:
        """Fields that config.json must have."""
        return (*SIZES, *self.sizes)

    @property
    def fields(self) -> set[str]:
        """All that it shares with ModelConfig."""
        return {*self.required, *self.optional}


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
UNREAD = {"attention_dropout": 0.0, "use_cache": True}
LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    {
        **OPTIONAL,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    always={"use_qk_norm": False},
    written={**UNREAD, "pretraining_tp": 1},
)
MISTRAL = Architecture(
    "MistralForCausalLM",
    "mistral",
    {
        **OPTIONAL,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    always={"attention_bias": False, "mlp_bias": False, "use_qk_norm": False},
    window="always",
)
QWEN2 = Architecture(
    "Qwen2ForCausalLM",
    "qwen2",
    {**OPTIONAL, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    always={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "use_qk_norm": False},
    written={**UNREAD, "use_sliding_window": False, "sliding_window": None},
    window="switched",
)
QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    {
        **OPTIONAL,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
    },
    always={"mlp_bias": False, "use_qk_norm": True},
    written={**UNREAD, "use_sliding_window": False, "sliding_window": None},
    window="switched",
)
GLM4_MOE = Architecture(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    {
        **OPTIONAL,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    sizes=("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
    always={"attention_out_bias": False, "mlp_bias": False},
    computed={
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",  # not a key of its own, but DeepSeek's
    },
    written={**UNREAD, "num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0},
    rotary_share=0.5,
)
ARCHITECTURES = {one.name: one for one in (LLAMA, MISTRAL, QWEN2, QWEN3, GLM4_MOE)}


# To Hugging Face


def hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in the spellings of transformers 4 and 5 at once.

    Both are needed: 4 reads `rope_theta`, `rope_scaling`, a `partial_rotary_factor` of its own and
    `torch_dtype`, and takes silent defaults without them; 5 writes and prefers `rope_parameters` and `dtype`.
    Special tokens are written even when there are none, because an absent one becomes 1 or 2.

    Raises CheckpointError, with the reason, for a model that transformers has no class for.
    """
    architecture = nearest_architecture(model)
    _check_has_a_class(model, architecture)
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else None
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta}
    if "partial_rotary_factor" in architecture.written:
        rope["partial_rotary_factor"] = architecture.written["partial_rotary_factor"]
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **model.model_dump(include=architecture.fields),
        **architecture.computed,
        **architecture.written,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def nearest_architecture(model: ModelConfig) -> Architecture:
    """The class that a model is of, if it is of any."""
    if model.n_routed_experts:
        return GLM4_MOE
    if model.use_qk_norm:
        return QWEN3
    return LLAMA if model.attention_out_bias == model.attention_bias else QWEN2


def _check_has_a_class(model: ModelConfig, architecture: Architecture) -> None:
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {model.hidden_size} is not divisible by num_attention_heads "
            f"{model.num_attention_heads}: transformers refuses such a model, it cannot be exported"
        )
    only = {"attention_out_bias": model.attention_bias, **architecture.always, **architecture.computed}
    for name, value in only.items():
        own = getattr(model, name, value)
        if own != value:
            raise CheckpointError(
                f"{name} is {_told(own)} and {architecture.name}, the nearest class of transformers, "
                f"computes {_told(value)} only: this model cannot be exported"
            )


# From Hugging Face


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes, of transformers 4 or 5; absent keys mean what they do there.

    Of several end tokens the first is kept. Raises CheckpointError, with the reason and `where` it stands,
    for a model that megalite does not compute.
    """
    architecture = _architecture_of(config, where)
    absent = [name for name in architecture.required if config.get(name) is None]
    if absent:
        raise CheckpointError(f"{where} has no {absent[0]}: it is no complete {architecture.name}")
    for name, value in architecture.computed.items():
        _check_computed(name, config.get(name, value), value, where)
    _check_window(config, architecture, where)
    fields = {**{name: config[name] for name in architecture.required}, **architecture.always}
    fields |= {name: config.get(name, default) for name, default in architecture.optional.items()}
    if isinstance(fields["eos_token_id"], list):
        fields["eos_token_id"] = next(iter(fields["eos_token_id"]), None)
    try:
        return ModelConfig.model_validate(fields | _rotary(config, architecture, where))
    except ValidationError as error:
        raise CheckpointError(explain(error, default=f"in {where}")) from None


def _architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    names = config.get("architectures") or ["none"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{where} is of architecture {', '.join(map(str, names))}: "
            f"only {', '.join(ARCHITECTURES)} can be imported"
        )
    return ARCHITECTURES[names[0]]


def _check_window(config: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """A window that is as long as the context is none."""
    if architecture.window == "never":
        return
    if architecture.window == "switched":
        for kind in config.get("layer_types") or []:
            _check_computed("layer_types", kind, "full_attention", where)
        if not config.get("use_sliding_window", False):
            return
    window = config.get("sliding_window", DEFAULT_WINDOW)
    context = config.get("max_position_embeddings", architecture.optional["max_position_embeddings"])
    if window is not None and window < context:
        raise CheckpointError(
            f"{where}: sliding_window is {window}, max_position_embeddings {context}, and megalite has no "
            f"window: set max_position_embeddings to {window} there to use the model within its window"
        )


def _rotary(config: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the spelling of 5, else that of 4."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or DEFAULT_ROPE_THETA
    shares = [rope.pop("partial_rotary_factor", None), config.get("partial_rotary_factor")]
    stated = [share for share in shares if share is not None] or [architecture.rotary_share]
    for share in stated:
        _check_computed("partial_rotary_factor", share, 1, where)
    old_name = rope.pop("type", "default")
    rope_type = rope.setdefault("rope_type", old_name)
    return {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else rope}


def _check_computed(name: str, found: Any, computed: Any, where: str) -> None:
    if found != computed:
        raise CheckpointError(
            f"{where}: {name} is {_told(found)} and megalite computes {_told(computed)} only: "
            "such a model cannot be imported"
        )


def _told(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
