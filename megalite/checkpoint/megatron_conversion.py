"""From a checkpoint of Megatron to a megalite checkpoint, and back.

On the way in each shard is cut into pieces where it lies, which megalite's own format takes from any number
of ranks: nothing is merged, and files per rank are read as they are written. On the way out each rank's
file is put together of boxes of our tensors; the distributed form is written as that of a single rank, tensor
by tensor.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from megalite.checkpoint.agreement import alone
from megalite.checkpoint.format import CONFIG, CheckpointError, Piece, list_steps
from megalite.checkpoint.load import TensorReader, read_state
from megalite.checkpoint.megatron import (
    BIAS,
    Layout,
    Tensor,
    blocks,
    megatron_tensors,
    pack,
    shard_shape,
    unpack,
)
from megalite.checkpoint.megatron_args import args_of_model, layout_args
from megalite.checkpoint.megatron_classic import Ranks, write_rank
from megalite.checkpoint.megatron_distributed import Entry, place_of, states_of, write_distributed
from megalite.checkpoint.megatron_folder import LATEST, MegatronFolder
from megalite.checkpoint.megatron_layout import (
    ExpertCut,
    Stage,
    check_divides,
    expert_cut,
    padded_vocab_size,
    stage_sizes,
    stages_of,
)
from megalite.checkpoint.save import save_checkpoint
from megalite.checkpoint.tensor_file import DTYPE_NAMES
from megalite.checkpoint.vacancy import require_vacant
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.config.load import dump_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.files import folder_aside, sync_folder, write_text

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
    return save_checkpoint(root, 0, pieces, state, files, rank=0, world_size=1, gather=alone)


def _stages(folder: MegatronFolder, model: ModelConfig) -> list[Stage]:
    sizes = folder.stage_layers or [model.num_hidden_layers]
    if sum(sizes) != model.num_hidden_layers:
        raise CheckpointError(
            f"{folder.path} has {sum(sizes)} layers, in stages of {sizes}, and the model "
            f"{model.num_hidden_layers}"
        )
    return stages_of(sizes)


def _pieces(folder: MegatronFolder, model: ModelConfig) -> Iterator[Piece]:
    first, *_ = megatron_tensors(model)  # refuses what has no place there
    stages, experts = _stages(folder, model), expert_cut(model, folder.ep_size)
    embedding = folder.shards(first, stages[0], experts)
    layout = Layout(folder.tp_size, sum(len(shard) for shard in embedding))
    if layout.padded_vocab_size < model.vocab_size:
        raise CheckpointError(
            f"{folder.path} has an embedding of {layout.padded_vocab_size} rows and the model a vocabulary "
            f"of {model.vocab_size}: name the right one (--vocab-size)"
        )
    for stage in stages:
        for tensor in megatron_tensors(model, stage):
            if _is_absent_bias(tensor, folder):
                yield blocks(tensor, model, layout, 0)[0].piece(torch.zeros(tensor.parts[0].shape))
                continue
            shards = folder.shards(tensor, stage, experts)
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

    form: "torch", one file per model-parallel rank, or "torch_dist", which any ranks load.
    tp_size, pp_size, ep_size: ranks that files are for; 1 in torch_dist.
    first_layers, last_layers: decoder layers of the first and the last stage, where they are told.
    local: whether for Megatron's own layers, else for transformer engine's.
    divisor: the padded vocabulary is a multiple of this times tp_size.
    """

    form: Literal["torch", "torch_dist"] = "torch"
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    local: bool = False
    divisor: int = 128


def export_megatron(weights: Weights, output: Path, target: Target) -> dict[str, Any]:
    """Write a checkpoint of Megatron; its arguments, which are in it too.

    Memory: in files per rank, the largest of them; in the distributed form, a few copies of the largest
    tensor.

    Raises CheckpointError when `output` exists and is not an empty folder, when the sizes do not divide, or
    when Megatron does not compute such a model. Then `output` is not touched.
    """
    output = Path(output)
    require_vacant(output)
    plan = _plan(weights, target)
    iteration = plan.state["iteration"]
    with folder_aside(output) as aside:
        folder = aside / f"iter_{iteration:07d}"
        folder.mkdir()
        (_write_ranks if target.form == "torch" else _write_whole)(folder, weights, plan)
        sync_folder(folder)
        write_text(aside / LATEST, str(iteration))
    return vars(plan.state["args"])


class _Plan(NamedTuple):
    """state: what is the same in all files."""

    target: Target
    layout: Layout
    stages: list[Stage]
    experts: ExpertCut
    state: dict[str, Any]


def _plan(weights: Weights, target: Target) -> _Plan:
    """Raises CheckpointError for whatever cannot be written."""
    model = weights.model
    megatron_tensors(model)
    if target.form == "torch_dist":
        _check_no_ranks(target)
    check_divides(model, target.tp_size)
    sizes = stage_sizes(model.num_hidden_layers, target.pp_size, target.first_layers, target.last_layers)
    experts = expert_cut(model, target.ep_size)
    _check_no_softmax_bias(weights)
    padded = padded_vocab_size(model, target.tp_size, target.divisor)
    layout = layout_args(target.tp_size, sizes, target.ep_size)
    step = read_state(weights.checkpoint).get("step", 0)
    args = args_of_model(model) | layout | _file_args(weights, target)
    args |= {"padded_vocab_size": padded, "iteration": step}
    state = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": step}
    return _Plan(target, Layout(target.tp_size, padded), stages_of(sizes), experts, state)


def _check_no_ranks(target: Target) -> None:
    sizes = {"--tp-size": target.tp_size, "--pp-size": target.pp_size, "--ep-size": target.ep_size}
    told = {name: size for name, size in sizes.items() if size > 1} | {
        "--decoder-first-pipeline-num-layers": target.first_layers,
        "--decoder-last-pipeline-num-layers": target.last_layers,
    }
    for name, size in told.items():
        if size is not None:
            raise CheckpointError(
                f"{name} is {size} and the distributed form is of no ranks, as any load it: leave it out"
            )


def _file_args(weights: Weights, target: Target) -> dict[str, Any]:
    """What is in the files, beside the model."""
    return {
        "make_vocab_size_divisible_by": target.divisor,
        "moe_grouped_gemm": bool(weights.model.n_routed_experts) and not target.local,
        "transformer_impl": "local" if target.local else "transformer_engine",
        "params_dtype": DTYPES[weights.dtype],
        "ckpt_format": target.form,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def _check_no_softmax_bias(weights: Weights) -> None:
    for name, part in weights.parts.items():
        if part.kind == "buffer" and weights.model.scoring_func == "softmax" and weights.read(name).any():
            raise CheckpointError(
                f"{name} is not zero and Megatron has no selection bias with softmax scores: "
                "this model cannot be converted"
            )


def _tensors(model: ModelConfig, stage: Stage) -> list[Tensor]:
    """Of a stage, as Megatron has them: no bias of a softmax router."""
    tensors = megatron_tensors(model, stage)
    return [t for t in tensors if not (t.row.ours == BIAS and model.scoring_func == "softmax")]


def _shard(
    tensor: Tensor, weights: Weights, reader: TensorReader, layout: Layout, tp_rank: int = 0
) -> torch.Tensor:
    boxes = [
        reader.read_box(block.part.kind, block.part.tensor, *block.box).view(block.shape)
        for block in blocks(tensor, weights.model, layout, tp_rank)
    ]
    return pack(shard_shape(tensor, layout), boxes).to(weights.dtype_of(tensor.parts[0].name))


def _write_ranks(folder: Path, weights: Weights, plan: _Plan) -> None:
    """The classic form."""
    target, reader = plan.target, weights.reader
    sizes = Ranks(target.tp_size, target.pp_size, target.ep_size)
    for ranks in (Ranks(*numbers) for numbers in product(*map(range, sizes))):
        stage = plan.stages[ranks.stage]
        shards = {}
        for tensor in _tensors(weights.model, stage):
            rank, expert = plan.experts.place(tensor.expert)
            if rank in (None, ranks.expert):
                name = tensor.named(tensor.spelling(local=target.local), stage.first_layer, expert)
                shards[name] = _shard(tensor, weights, reader, plan.layout, ranks.tp)
        write_rank(folder / ranks.folder_name(sizes), {**plan.state, "model": shards})


def _write_whole(folder: Path, weights: Weights, plan: _Plan) -> None:
    """The distributed form: a file of what stands at the ends, and one of each layer."""
    [stage], local = plan.stages, plan.target.local
    files = dict[int, list[Tensor]]()
    for tensor in _tensors(weights.model, stage):
        files.setdefault(0 if tensor.layer is None else 1 + tensor.layer, []).append(tensor)
    reader = weights.reader

    def entries(tensors: list[Tensor]) -> Iterator[Entry]:
        yield from ((place, None) for place in states_of(tensors, weights.model, local=local))
        for tensor in tensors:
            read = partial(_shard, tensor, weights, reader, plan.layout)
            yield place_of(tensor, weights.model, local=local), read

    write_distributed(folder, map(entries, files.values()), plan.state)
