"""Megatron's arguments and megalite's model: which setting there is which here, both ways."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.megatron_layout import has_equal_layers
from megalite.config.model import ModelConfig, RopeScalingConfig
from megalite.config.section import explain

# Megatron's name -> ours: both hold the same number.
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
OPTIONAL = {"kv_channels": "head_dim", "rotary_base": "rope_theta", "init_method_std": "initializer_range"}
EXPERT_SIZES = {
    "num_experts": "n_routed_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
}
# What megalite computes, and what an absent argument means.
COMPUTED: dict[str, tuple[Any, Any]] = {
    "position_embedding_type": ("rope", "learned_absolute"),
    "normalization": ("RMSNorm", "LayerNorm"),
    "swiglu": (True, False),
    "rotary_percent": (1.0, 1.0),
    "rotary_interleaved": (False, False),
    "apply_layernorm_1p": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "multi_latent_attention": (False, False),
    "mtp_num_layers": (None, None),
    "heterogeneous_layers_config_path": (None, None),
    "window_size": (None, None),
    "softmax_type": ("vanilla", "vanilla"),
}
COMPUTED_OF_EXPERTS: dict[str, tuple[Any, Any]] = {
    "moe_router_num_groups": (None, None),
    "moe_latent_size": (None, None),
    "moe_shared_expert_gate": (False, False),
    "moe_apply_probs_on_input": (False, False),
    "moe_use_legacy_grouped_gemm": (False, False),
}
# Megatron's only stretching of the Llama 3 kind; the factor is an argument.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# From Megatron


def model_of_args(args: Mapping[str, Any], where: str, vocab_size: int | None = None) -> ModelConfig:
    """The model that Megatron's arguments describe.

    vocab_size: rows of the embedding without padding; by default what the arguments say, padded or not.

    Raises CheckpointError, with the reason and `where` they stand, for one that megalite does not compute.
    """
    _check_computed(args, COMPUTED, where)
    absent = [name for name in SIZES if args.get(name) is None]
    if absent:
        raise CheckpointError(
            f"the arguments in {where} have no {absent[0]}: describe the model (--model-config)"
        )
    fields = {ours: args[name] for name, ours in SIZES.items()}
    fields |= {ours: args[name] for name, ours in OPTIONAL.items() if args.get(name) is not None}
    grouped = args.get("group_query_attention")
    fields["num_key_value_heads"] = args.get("num_query_groups") if grouped else None
    fields["vocab_size"] = vocab_size or args.get("vocab_size") or args.get("padded_vocab_size")
    fields["tie_word_embeddings"] = not args.get("untie_embeddings_and_output_weights", False)
    fields |= _biases(args) | _expert_fields(args, where)
    fields["rope_scaling"] = _scaling(args)
    if args.get("qk_layernorm"):
        fields["use_qk_norm"] = True
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(explain(error, default=f"by the arguments in {where}")) from None


def _biases(args: Mapping[str, Any]) -> dict[str, Any]:
    everywhere = bool(args.get("add_bias_linear", True))
    fields = {"attention_bias": everywhere or bool(args.get("add_qkv_bias")), "mlp_bias": everywhere}
    if fields["attention_bias"] and not everywhere:
        fields["attention_out_bias"] = False
    return fields


def _scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": args.get("rope_scaling_factor") or 8.0, **LLAMA3}
    if args.get("rotary_seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": args["rotary_seq_len_interpolation_factor"]}
    return None


def _expert_fields(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not args.get("num_experts"):
        return {}
    _check_computed(args, COMPUTED_OF_EXPERTS, where)
    fields = {ours: args.get(name) for name, ours in EXPERT_SIZES.items()}
    fields["moe_intermediate_size"] = width = fields["moe_intermediate_size"] or args["ffn_hidden_size"]
    shared = args.get("moe_shared_expert_intermediate_size") or 0
    if shared % width:
        raise CheckpointError(
            f"{where}: shared experts of width {shared} are no multiple of experts of {width}"
        )
    fields["n_shared_experts"] = shared // width
    fields["first_k_dense_replace"] = _num_dense_layers(args, where)
    fields["scoring_func"] = score = args.get("moe_router_score_function") or "softmax"
    chosen_alone = (
        fields["num_experts_per_tok"] == 1 if score == "sigmoid" else args.get("moe_router_pre_softmax")
    )
    fields["norm_topk_prob"] = not chosen_alone
    fields["routed_scaling_factor"] = args.get("moe_router_topk_scaling_factor") or 1.0
    return fields


def _num_dense_layers(args: Mapping[str, Any], where: str) -> int:
    """Layers before the first with experts; from there on every one must have them."""
    pattern = args.get("moe_layer_freq") or 1
    kinds = (
        pattern if isinstance(pattern, list) else [int(i % pattern == 0) for i in range(args["num_layers"])]
    )
    num_dense = kinds.index(1) if 1 in kinds else len(kinds)
    if not all(kinds[num_dense:]):
        raise CheckpointError(
            f"{where}: moe_layer_freq is {pattern} and megalite has experts in all layers from one on: "
            "such a model cannot be converted"
        )
    return num_dense


def _check_computed(args: Mapping[str, Any], computed: Mapping[str, tuple[Any, Any]], where: str) -> None:
    for name, (value, absent) in computed.items():
        if args.get(name, absent) != value:
            raise CheckpointError(
                f"{where}: {name} is {args.get(name, absent)} and megalite computes {value} only: "
                "such a model cannot be converted"
            )


# To Megatron


def args_of_model(model: ModelConfig) -> dict[str, Any]:
    """The arguments under which Megatron computes this model.

    Raises CheckpointError, with the reason, where there are none.
    """
    fields = model.model_dump()
    args = {name: fields[ours] for name, ours in (SIZES | OPTIONAL).items()}
    args |= {name: value for name, (value, _) in COMPUTED.items()}
    args |= {
        "seq_length": model.max_position_embeddings,
        "group_query_attention": model.num_key_value_heads != model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "qk_layernorm": fields.get("use_qk_norm", False),
        "data_parallel_random_init": False,
    }
    return args | _bias_args(fields) | _scaling_args(model.rope_scaling) | _expert_args(model)


def layout_args(tp_size: int, stage_layers: list[int], ep_size: int) -> dict[str, Any]:
    """The arguments of files for so many ranks, with stages of so many layers."""
    first, *_, last = stage_layers * 2
    equal = len(set(stage_layers)) == 1
    return {
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": len(stage_layers),
        "expert_model_parallel_size": ep_size,
        "expert_tensor_parallel_size": tp_size,
        "decoder_first_pipeline_num_layers": None if equal else first,
        "decoder_last_pipeline_num_layers": None if equal else last,
    }


def _bias_args(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron has biases everywhere, or in query, key and value alone."""
    inner = bool(fields["attention_bias"])
    outer, mlp = bool(fields.get("attention_out_bias", inner)), bool(fields["mlp_bias"])
    if outer != mlp or (outer and not inner):
        raise CheckpointError(
            "Megatron has biases in all linear layers, or in query, key and value alone: this model, whose "
            "attention or whose MLP alone has them, cannot be converted"
        )
    return {"add_bias_linear": mlp, "add_qkv_bias": inner and not mlp}


def _scaling_args(scaling: RopeScalingConfig | None) -> dict[str, Any]:
    if scaling is None:
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    if scaling.rope_type == "linear":
        if scaling.factor != int(scaling.factor):
            raise CheckpointError(f"rope_scaling.factor {scaling.factor} is no integer, as Megatron needs it")
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": int(scaling.factor)}
    for name, value in LLAMA3.items():
        if getattr(scaling, name) != value:
            raise CheckpointError(
                f"rope_scaling.{name} is {getattr(scaling, name)} and Megatron computes {value} only: "
                "this model cannot be converted"
            )
    return {
        "use_rope_scaling": True,
        "rope_scaling_factor": scaling.factor,
        "rotary_seq_len_interpolation_factor": None,
    }


def _expert_args(model: ModelConfig) -> dict[str, Any]:
    if not model.n_routed_experts:
        return {"num_experts": None}
    sigmoid, alone = model.scoring_func == "sigmoid", model.num_experts_per_tok == 1
    if sigmoid and model.norm_topk_prob == alone:
        raise CheckpointError(
            f"norm_topk_prob is {model.norm_topk_prob} and Megatron's sigmoid router computes {not alone} "
            f"only with {model.num_experts_per_tok} experts per token: this model cannot be converted"
        )
    dense = model.first_k_dense_replace
    frequency = 1 if has_equal_layers(model) else [0] * dense + [1] * (model.num_hidden_layers - dense)
    return {
        **{name: getattr(model, ours) for name, ours in EXPERT_SIZES.items()},
        **{name: value for name, (value, _) in COMPUTED_OF_EXPERTS.items()},
        "moe_shared_expert_intermediate_size": model.shared_intermediate_size or None,
        "moe_layer_freq": frequency,
        "moe_router_score_function": model.scoring_func,
        "moe_router_pre_softmax": not sigmoid and not model.norm_topk_prob,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_enable_expert_bias": sigmoid,
    }
