"""From a checkpoint of Megatron to a megalite checkpoint, and back.

On the way in each shard is cut into pieces where it lies, which megalite's own format takes from any number
of ranks: nothing is merged, and files per rank are read as they are written. On the way out each rank's
file is put together of boxes of our tensors.
"""

from argparse import Namespace
from collections.abc import Iterator
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalite.checkpoint.agreement import alone
from megalite.checkpoint.format import CONFIG, CheckpointError, Piece, list_steps
from megalite.checkpoint.load import read_state
from megalite.checkpoint.megatron import (
    BIAS,
    Layout,
    Tensor,
    blocks,
    check_divides,
    megatron_tensors,
    pack,
    padded_vocab_size,
    shard_shape,
    unpack,
)
from megalite.checkpoint.megatron_args import args_of_model
from megalite.checkpoint.megatron_folder import LATEST, RANK_FILE, MegatronFolder
from megalite.checkpoint.save import save_checkpoint
from megalite.checkpoint.tensor_file import DTYPE_NAMES
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.config.load import dump_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.files import folder_aside, sync, sync_folder, write_text

# From Megatron


def import_megatron(folder: MegatronFolder, root: Path, run: RunConfig) -> Path:
    """Write the checkpoint of step 0 under `root`: weights and routers' biases, nothing of an optimizer.

    run: goes into it; its model is the folder's.

    Raises CheckpointError when there are checkpoints already, or the folder does not hold exactly the model's
    tensors, each the same on all ranks that hold it whole. Then nothing is written.
    """
    if list_steps(root):
        raise CheckpointError(f"{root} has checkpoints already: name another output, or move them away")
    pieces = list(_pieces(folder, run.model))
    for name in folder.unread():
        raise CheckpointError(f"there is {name}, which the model does not have: describe it (--model-config)")
    state = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0, "optimizer_steps": 0}
    files = {CONFIG: dump_run(run)}
    return save_checkpoint(root, 0, pieces, state, files, rank=0, world_size=1, gather=alone, keep_last=0)


class _Stage(NamedTuple):
    rank: int
    first_layer: int
    num_layers: int


def _stages(folder: MegatronFolder, model: ModelConfig) -> list[_Stage]:
    sizes = folder.stage_layers or [model.num_hidden_layers]
    if sum(sizes) != model.num_hidden_layers:
        raise CheckpointError(
            f"{folder.path} has {sum(sizes)} layers, in stages of {sizes}, and the model "
            f"{model.num_hidden_layers}"
        )
    firsts = accumulate(sizes[:-1], initial=0)
    return [_Stage(rank, *layers) for rank, layers in enumerate(zip(firsts, sizes, strict=True))]


def _pieces(folder: MegatronFolder, model: ModelConfig) -> Iterator[Piece]:
    tensors = megatron_tensors(model)  # refuses what has no place there
    embedding = folder.shards(tensors[0], 0, 0)
    layout = Layout(folder.tp_size, sum(len(shard) for shard in embedding))
    if layout.padded_vocab_size < model.vocab_size:
        raise CheckpointError(
            f"{folder.path} has an embedding of {layout.padded_vocab_size} rows and the model a vocabulary "
            f"of {model.vocab_size}: name the right one (--vocab-size)"
        )
    for stage in _stages(folder, model):
        for tensor in megatron_tensors(model, stage.first_layer, stage.num_layers):
            if _is_absent_bias(tensor, folder):
                yield blocks(tensor, model, layout, 0)[0].piece(torch.zeros(tensor.parts[0].shape))
                continue
            shards = folder.shards(tensor, stage.rank, stage.first_layer)
            _check(tensor, shards, layout, folder, embedding)
            if not tensor.is_copy:
                yield from _pieces_of(tensor, shards, layout, model)


def _pieces_of(
    tensor: Tensor, shards: list[torch.Tensor], layout: Layout, model: ModelConfig
) -> Iterator[Piece]:
    for rank, shard in enumerate(shards[:1] if tensor.row.cut == "whole" else shards):
        for block, view in unpack(shard, blocks(tensor, model, layout, rank)):
            yield block.piece(view)


def _is_absent_bias(tensor: Tensor, folder: MegatronFolder) -> bool:
    """Whether it is a router's bias, which Megatron has where it is told to balance by it."""
    enabled = (folder.args or {}).get("moe_router_enable_expert_bias", True)
    return tensor.row.ours == BIAS and not enabled


def _check(
    tensor: Tensor,
    shards: list[torch.Tensor],
    layout: Layout,
    folder: MegatronFolder,
    embedding: list[torch.Tensor],
) -> None:
    """Raise CheckpointError unless all ranks have it in one right shape, and what must be equal is."""
    what, shape = f"{folder.path}: {tensor.named(tensor.spellings[0])}", shard_shape(tensor, layout)
    shapes = [tuple(shard.shape) for shard in shards]
    if len(set(shapes)) > 1:
        raise CheckpointError(f"{what} has unequal shapes {shapes} on the tensor-parallel ranks")
    if shapes[0] != shape:
        raise CheckpointError(
            f"{what} has shape {list(shapes[0])} on each of {layout.tp_size} ranks, by the model it is "
            f"{list(shape)}"
        )
    for shard in shards:
        if shard.dtype not in DTYPE_NAMES:
            known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
            raise CheckpointError(f"{what} is {shard.dtype}, expected one of {known}")
    if tensor.row.cut == "whole" and not all(shard.equal(shards[0]) for shard in shards):
        raise CheckpointError(f"{what} differs among tensor-parallel ranks, which hold it whole")
    if tensor.is_copy and not all(a.equal(b) for a, b in zip(shards, embedding, strict=True)):
        raise CheckpointError(f"{what} differs from the embedding, which it is a copy of")


# To Megatron


class Target(NamedTuple):
    """How Megatron's files are to be.

    tp_size, pp_size: ranks that they are for.
    local: whether for Megatron's own layers, else for transformer engine's.
    divisor: the padded vocabulary is a multiple of this times tp_size.
    """

    tp_size: int = 1
    pp_size: int = 1
    local: bool = False
    divisor: int = 128


def export_megatron(weights: Weights, output: Path, target: Target) -> Path:
    """Write the classic form, one file per model-parallel rank. Memory: the largest of them.

    Raises CheckpointError when `output` exists and is not an empty folder, when the sizes do not divide, or
    when Megatron does not compute such a model. Then `output` is not touched.
    """
    output, model = Path(output), weights.model
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder: remove it or name another")
    layout, state = _plan(weights, target)
    num_layers = model.num_hidden_layers // target.pp_size
    with folder_aside(output) as aside:
        iteration = aside / f"iter_{state['iteration']:07d}"
        for tp_rank, stage in product(range(target.tp_size), range(target.pp_size)):
            first = stage * num_layers
            tensors = megatron_tensors(model, first, num_layers)
            shards = {
                tensor.named(tensor.spelling(local=target.local), first): _shard(
                    tensor, weights, layout, tp_rank
                )
                for tensor in tensors
                if not (tensor.row.ours == BIAS and model.scoring_func == "softmax")
            }
            rank = f"mp_rank_{tp_rank:02d}" + f"_{stage:03d}" * (target.pp_size > 1)
            _write(iteration / rank, {**state, "model": shards})
        sync_folder(iteration)
        write_text(aside / LATEST, str(state["iteration"]))
    return output


def _plan(weights: Weights, target: Target) -> tuple[Layout, dict[str, Any]]:
    """What is the same in all files."""
    model = weights.model
    megatron_tensors(model)
    check_divides(model, target.tp_size, target.pp_size)
    _check_no_softmax_bias(weights)
    padded = padded_vocab_size(model, target.tp_size, target.divisor)
    args = args_of_model(model, tp_size=target.tp_size, pp_size=target.pp_size, padded_vocab_size=padded)
    args["make_vocab_size_divisible_by"] = target.divisor
    args["moe_grouped_gemm"] = bool(model.n_routed_experts) and not target.local
    args["transformer_impl"] = "local" if target.local else "transformer_engine"
    args["params_dtype"], args["ckpt_format"] = DTYPES[weights.dtype], "torch"
    step = read_state(weights.checkpoint).get("step", 0)
    args["iteration"] = step
    return Layout(target.tp_size, padded), {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": step,
    }


def _check_no_softmax_bias(weights: Weights) -> None:
    for name, part in weights.parts.items():
        if part.kind == "buffer" and weights.model.scoring_func == "softmax" and weights.read(name).any():
            raise CheckpointError(
                f"{name} is not zero and Megatron has no selection bias with softmax scores: "
                "this model cannot be converted"
            )


def _shard(tensor: Tensor, weights: Weights, layout: Layout, tp_rank: int) -> torch.Tensor:
    boxes = [
        weights.reader.read_box(block.part.kind, block.part.tensor, *block.box).view(block.shape)
        for block in blocks(tensor, weights.model, layout, tp_rank)
    ]
    return pack(shard_shape(tensor, layout), boxes).to(weights.dtype_of(tensor.parts[0].name))


def _write(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    with (folder / RANK_FILE).open("wb") as file:
        torch.save(state, file)
        sync(file)
    sync_folder(folder)
