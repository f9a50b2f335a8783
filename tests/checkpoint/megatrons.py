"""Tiny random models of megatron-core itself, on the CPU, saved and loaded as Megatron-LM does it.

Everything here is Megatron's own but for the arguments, which are written by hand. Bodies of ranks, for
`run_distributed`; tensor parallel comes first among the ranks, then pipeline stages.
"""

import dataclasses
from argparse import Namespace
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megalite.config.model import ModelConfig

ITERATION = 7
DENSE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 101,
    "padded_vocab_size": 112,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "num_experts": None,
}
EXPERTS: dict[str, Any] = {
    "num_layers": 3,
    "num_experts": 4,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 40,
    "moe_router_topk": 2,
    "moe_layer_freq": [0, 1, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.5,
    "moe_router_load_balancing_type": "none",
    "moe_router_pre_softmax": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one group": {"num_query_groups": 1},
    "four groups": {"group_query_attention": False, "num_query_groups": 1},
    "tied": {"untie_embeddings_and_output_weights": False},
    "biases": {"add_bias_linear": True},
    "wide heads": {"kv_channels": 16, "norm_epsilon": 1e-3, "rotary_base": 500000},
    "linear": {"rotary_seq_len_interpolation_factor": 4},
    "llama3": {
        "use_rope_scaling": True,
        "rope_scaling_factor": 16.0,
        "rotary_base": 500000,
        "kv_channels": 16,
    },
    "experts": EXPERTS,
    "softmax experts": EXPERTS
    | {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "moe_layer_freq": 1},
}
if "use_qk_norm" in ModelConfig.model_fields:
    VARIANTS["norms of heads"] = {"qk_layernorm": True, "kv_channels": 16}
if "attention_out_bias" in ModelConfig.model_fields:
    VARIANTS["biases of heads"] = {"add_qkv_bias": True}


ON_CPU: dict[str, Any] = {
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "use_cpu_initialization": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_grouped_gemm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
}


def arguments(variant: str, tp_size: int = 1, pp_size: int = 1, ep_size: int = 1, **others: Any) -> Namespace:
    layout = {
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
        "expert_model_parallel_size": ep_size,
    }
    return Namespace(**(DENSE | VARIANTS[variant] | layout | others))


def world_size(args: Namespace) -> int:
    """Of as few ranks as there can be: experts lie over data-parallel ones."""
    sizes = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
    return prod(getattr(args, size) for size in sizes)


def build_gpt(args: Namespace) -> GPTModel:
    """This rank's part of the model that Megatron's arguments describe, as Megatron-LM makes it of them."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.Stream = torch.cuda.current_stream = MagicMock()  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda _: nullcontext()  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor: tensor  # type: ignore[assignment]
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
        )
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    same = {name: value for name, value in vars(args).items() if name in fields}
    named_otherwise = {
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "num_moe_experts": args.num_experts,
        "layernorm_epsilon": args.norm_epsilon,
        "gated_linear_unit": args.swiglu,
        "activation_func": torch.nn.functional.silu,
        "num_layers_in_first_pipeline_stage": getattr(args, "decoder_first_pipeline_num_layers", None),
        "num_layers_in_last_pipeline_stage": getattr(args, "decoder_last_pipeline_num_layers", None),
        "moe_token_dispatcher_type": "alltoall",
    }
    config = TransformerConfig(**same | named_otherwise | ON_CPU)
    layer = (
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        if args.num_experts
        else get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=args.qk_layernorm)
    )
    return GPTModel(
        config,
        layer,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    ).eval()


@torch.no_grad()
def randomise(model: GPTModel) -> None:
    """Weights of size 1/sqrt(inputs), so that every part changes the logits; padding is random as well.

    What ranks hold in common is equal on them: Megatron would have made it so.
    """
    tp_rank, ep_rank = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor is None or "_extra_state" in name:
            continue
        cut = getattr(dict(model.named_parameters()).get(name), "tensor_model_parallel", False)
        seed = 10 * stage + tp_rank * cut + 100 * ep_rank * ("local_experts" in name)
        generator = torch.Generator().manual_seed(1000 * index + seed)
        if "expert_bias" in name:
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=2 * tensor.shape[-1] ** -0.5, generator=generator)
    model_copies_embedding(model)


def model_copies_embedding(model: GPTModel) -> None:
    """The last of several stages has a copy of a tied embedding."""
    if (
        parallel_state.get_pipeline_model_parallel_world_size() == 1
        or not model.share_embeddings_and_output_weights
    ):
        return
    weight = model.shared_embedding_or_output_weight()
    dist.broadcast(
        weight.data,
        parallel_state.get_pipeline_model_parallel_first_rank(),
        parallel_state.get_embedding_group(),
    )


@torch.no_grad()
def gpt_logits(model: GPTModel) -> torch.Tensor | None:
    """[2, 48, padded vocabulary] of fixed tokens, on the last stage."""
    tokens = fixed_tokens()
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    if not model.pre_process:
        hidden = torch.empty(length, len(tokens), model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    out = model(tokens, positions, mask)
    if not model.post_process:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    shares = [torch.empty_like(out) for _ in range(group.size())]
    dist.all_gather(shares, out.contiguous(), group=group)
    return torch.cat(shares, dim=-1)


def fixed_tokens() -> torch.Tensor:
    return torch.randint(101, (2, 48), generator=torch.Generator().manual_seed(1))


def rank_folder(folder: Path) -> Path:
    """Where Megatron-LM has this rank's file."""
    tp_rank, stage = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    of_stage = f"_{stage:03d}" if parallel_state.get_pipeline_model_parallel_world_size() > 1 else ""
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        of_stage += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return folder / f"iter_{ITERATION:07d}" / f"mp_rank_{tp_rank:02d}{of_stage}"


def save_gpt(rank: int, args: Namespace, folder: Path, distributed: bool = False) -> torch.Tensor | None:
    """Save a random model in the classic or the distributed form; its logits, on the last stage."""
    model = build_gpt(args)
    randomise(model)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    if distributed:
        save_distributed(model, state, folder / f"iter_{ITERATION:07d}")
    else:
        here = rank_folder(folder)
        here.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"model": model.state_dict()}, here / "model_optim_rng.pt")
    if rank == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return gpt_logits(model)


def wait_for_no_gpu() -> None:
    """Megatron waits for one in both ways, and there is none."""
    torch.cuda.synchronize = lambda *_: None


def save_distributed(model: GPTModel, state: dict[str, Any], folder: Path) -> None:
    """As Megatron-LM does under --ckpt-format torch_dist."""
    wait_for_no_gpu()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, str(folder))


def load_gpt(rank: int, folder: Path, iteration: int = 0) -> torch.Tensor | None:
    """Build the model of the arguments in a checkpoint, and load it, no name missing; its logits."""
    [first, *_] = sorted((folder / f"iter_{iteration:07d}").glob("mp_rank_*/*.pt"))
    with torch.serialization.safe_globals([Namespace]):
        model = build_gpt(torch.load(first)["args"])
        file = folder / f"iter_{iteration:07d}" / rank_folder(folder).name / "model_optim_rng.pt"
        model.load_state_dict(torch.load(file)["model"], strict=True)
    return gpt_logits(model)


def load_distributed(rank: int, folder: Path, layout: dict[str, Any]) -> torch.Tensor | None:
    """Build the model of the arguments in a distributed checkpoint, for a layout, and load it; its logits.

    As Megatron-LM does it, but that every key on either side must be on the other.
    """
    wait_for_no_gpu()
    path = str(folder / "iter_0000000")
    register_safe_globals()
    common = dist_checkpointing.load_common_state_dict(path)
    assert dist_checkpointing.load_content_metadata(preloaded_state_dict=common) is None
    model = build_gpt(Namespace(**vars(common["args"]) | layout))
    asked = {"model": model.sharded_state_dict()}
    state = dist_checkpointing.load(asked, path, strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(state["model"], strict=True)
    return gpt_logits(model)
