"""What each byte of a rank is for, before the run starts (pure arithmetic).

    plan_memory(run, deepspeed, world_size, rank)  # {"weights": ..., "master copy": ..., ...}

The sum is the most that a rank holds at once from its second step on, when the optimizer's state is there;
gradients that are not there at that moment (ZeRO 0 and 1, where forwards come first) are not in it.
What libraries, data and CUDA take comes on top, and so do transfers within a communication library.
"""

from collections.abc import Mapping

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.parallel.slots import SLOTS, fits
from megalite.plan.buckets import REDUCTION_PIECE, bucket_sizes, live_elements
from megalite.plan.flight import fullest_moment
from megalite.plan.layout import RankLayout
from megalite.plan.owner import gradients_are_let_go, reduces_in_the_end, state_bytes
from megalite.plan.tensors import LocalTensor, tensors_of_rank, unread_in_backward

MODEL_STATE = ("weights", "master copy", "gradients", "moments")
SHARED = "shared memory"


def plan_memory(
    run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int, rank: int, *, device: str = "cpu"
) -> dict[str, int]:
    """Bytes of one of `world_size` ranks by what they are for, in the order of a table.

    device: "cpu" or "cuda", which have other kernels where a run leaves the choice open. Raises ConfigError
    where the run does not lie on so many ranks.
    """
    layout = RankLayout(run, deepspeed, world_size, rank)
    tensors = tensors_of_rank(layout)
    sizes = bucket_sizes(layout)
    state = state_bytes(layout, tensors)
    comes_and_goes = state["gradients"] if gradients_are_let_go(layout) else 0
    reduction = _reduction(layout, tensors, sizes["reduce_bucket_size"], device)
    whole = _gathered(layout, tensors, sizes)
    kept, working, there, gathered = fullest_moment(
        layout, device, comes_and_goes, reduction=reduction, gathered=whole
    )
    plan = {
        **state,
        "gradients": state["gradients"] - comes_and_goes + there,
        "gathered weights": gathered,
        "buckets": _buckets(layout, sizes),
        "activations": kept,
        "working set": working,
        "communication": _communication(layout),
    }
    return plan | (_shared(layout, tensors, sizes["reduce_bucket_size"]) if _shares(layout, device) else {})


def _gathered(layout: RankLayout, tensors: list[LocalTensor], sizes: Mapping[str, int]) -> tuple[int, int]:
    """ZeRO-3: whole weights in use, in forward and in backward, which does not read all tables.

    All of a rank's in a step, or a module's, small ones and what comes next. What no other rank has a part of
    is used where it lies.
    """
    tensors = [tensor for tensor in tensors if tensor.num_data_ranks > 1]
    if layout.deepspeed.zero_stage < 3 or not tensors:
        return 0, 0
    whole = sum(tensor.numel for tensor in tensors)
    if layout.run.parallel.parameter_gathering == "step":
        return whole * layout.number_bytes, whole * layout.number_bytes
    unread = unread_in_backward(layout)
    read = [tensor for tensor in tensors if tensor.row.name not in unread]
    forward, backward = (min(live_elements(each, sizes), whole) for each in (tensors, read))
    return forward * layout.number_bytes, backward * layout.number_bytes


def _buckets(layout: RankLayout, sizes: Mapping[str, int]) -> int:
    """Where gradients wait for their reduction: ZeRO 1 and 2 have two to communicate while they compute."""
    stage, zero = layout.deepspeed.zero_stage, layout.deepspeed.raw.get("zero_optimization") or {}
    if reduces_in_the_end(layout):
        return 0
    number = 2 if stage < 3 and zero.get("overlap_comm") else 1
    return number * sizes["reduce_bucket_size"] * layout.number_bytes


def _reduction(layout: RankLayout, tensors: list[LocalTensor], bucket: int, device: str) -> int:
    """While a bucket, or a larger tensor, is reduced: its copy in one piece, and the part left of it.

    ZeRO-0 and BF16_Optimizer reduce all in one. ZeRO-3 copies no tensor that it reduces by itself and that
    divides, and leaves the part in its place; on a CPU a piece is on its way and is summed, and over sockets
    comes before that.
    """
    trained = [tensor for tensor in tensors if tensor.is_trained]
    stage, ranks = layout.deepspeed.zero_stage, layout.num_data_ranks
    if reduces_in_the_end(layout):  # in one piece, and once more in the format of communication
        rounded = layout.number_bytes if layout.gradient_bytes != layout.number_bytes else 0
        number = sum(tensor.numel for tensor in trained)
        return number * (layout.gradient_bytes + rounded) if ranks > 1 else 0
    copied = [t.numel for t in trained if stage < 3 or t.numel % t.num_data_ranks]
    whole = max(bucket, *copied, 0)
    if stage == 3 and device == "cpu":
        piece = _piece(tensors, bucket)
        pieces = piece // ranks + (1 if _shares(layout, device) else 2) * piece
        return (whole + (pieces if ranks > 1 else 0)) * layout.number_bytes
    part = whole // ranks if ranks > 1 else 0
    if stage < 3:
        return (whole + part) * layout.number_bytes
    cast = layout.gradient_bytes if layout.gradient_bytes != layout.number_bytes else 0  # of the part
    return whole * layout.number_bytes + part * cast


def _piece(tensors: list[LocalTensor], bucket: int) -> int:
    """Elements that ZeRO-3 reduces at a time on a CPU."""
    return min(max(bucket, *(tensor.numel for tensor in tensors if tensor.is_trained), 0), REDUCTION_PIECE)


def _shares(layout: RankLayout, device: str) -> bool:
    return device == "cpu" and layout.run.parallel.share_node_memory


def _shared(layout: RankLayout, tensors: list[LocalTensor], bucket: int) -> dict[str, int]:
    """What ranks of a node exchange through: this rank's slots, and what it reads of others', at the most.

    The system counts it for each that has touched it. It is of tensor parallelism and of ZeRO-3's sums: what
    context parallelism and copies of key/value heads exchange is not counted.
    """
    n, e = layout.num_data_ranks, layout.number_bytes
    reduces = n > 1 and layout.deepspeed.zero_stage == 3
    of_sums = 2 * (n - 1) * _piece(tensors, bucket) * e // n if reduces else 0
    return {SHARED: SLOTS * (_slot_of_layers(layout) + of_sums)}


def _slot_of_layers(layout: RankLayout) -> int:
    """What tensor-parallel layers take of a slot of this rank and of each of the others.

    What a rank says to all lies at a slot's beginning, and so do the parts of a sum, one for each of the
    others, of which one is read.
    """
    t, parallel = layout.tp_size, layout.run.parallel
    whole = layout.tokens * layout.run.model.hidden_size * layout.number_bytes
    if t == 1 or not parallel.sequence_parallel:
        return t * whole if t > 1 and fits(whole) else 0
    parts = whole // t, whole // t // parallel.row_overlap_chunks
    said = max((part for part in parts if fits(part)), default=0)
    summed = max((part for part in parts if fits(part, t - 1)), default=0)
    read = max(said, summed) if t == 2 else said + summed
    return max(said, (t - 1) * summed) + (t - 1) * read


def _communication(layout: RankLayout) -> int:
    """What comes from, and goes to, other ranks: between stages, and gathered along the sequence."""
    h, e = layout.run.model.hidden_size, layout.number_bytes
    stages = 2 * layout.tokens_between * h * e if layout.run.parallel.pp_size > 1 else 0
    sequence = layout.tokens * h * e if layout.tp_size > 1 else 0
    return stages + sequence
