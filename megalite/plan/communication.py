"""What a rank says to others in one optimizer step, by kind and link, and how long that takes (no torch).

A collective over n ranks on a ring sends (n - 1) / n of its tensor in n - 1 hops, an all-reduce twice that. A
ring that leaves the node goes at the speed of the network devices of its ranks there, if the links within the
node are not slower.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

from megalite.config.device import DeviceConfig
from megalite.model.share import StageShare
from megalite.plan.buckets import collective_sizes
from megalite.plan.job import Job
from megalite.plan.stage import StageSize, stage_size

Phase = Literal["forward", "backward_input", "backward_weight", "step"]
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
TURNS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


@dataclass(frozen=True)
class Flow:
    """Calls of one collective, of a rank.

    Attributes:
        axis: of the group; what: travels.
        phase: of a micro batch ("step": once per step).
        size_bytes: of the whole tensor, in one call.
        num_calls: per micro batch and stage, or per step.
        num_ranks, ranks_per_node: of the group, and of these on one node.
        is_hidden: whether computation goes on meanwhile.
    """

    kind: Kind
    axis: str
    what: str
    phase: Phase
    size_bytes: float
    num_calls: float
    num_ranks: int
    ranks_per_node: int
    is_hidden: bool = False

    @property
    def link(self) -> str:
        """What it goes over."""
        return "node" if self.num_ranks <= self.ranks_per_node else "network"

    @property
    def sent_bytes(self) -> float:
        """By one rank, in all calls."""
        if self.kind == "send":
            return self.size_bytes * self.num_calls
        n = self.num_ranks
        return TURNS[self.kind] * (n - 1) / n * self.size_bytes * self.num_calls

    def seconds(self, device: DeviceConfig) -> float:
        """Of all calls, if nothing hides them."""
        link, network = (
            1e9 * speed * device.communication_efficiency
            for speed in (device.link_gb_per_second, device.network_gb_per_second)
        )
        n, here = self.num_ranks, min(self.num_ranks, self.ranks_per_node)
        if self.link == "node":
            speed = link
        elif self.kind == "all-to-all":  # each rank's own share of the network
            speed = min(link, network * (n - 1) / (n - here))
        else:
            speed = min(link, network * (1 if self.kind == "send" else here))
        hops = 1 if self.kind == "send" else TURNS[self.kind] * (n - 1)
        between = 0 if self.link == "node" else max(1, hops // here)
        latency = between * device.network_latency_seconds + (hops - between) * device.link_latency_seconds
        return self.sent_bytes / speed + self.num_calls * latency


def stage_flows(job: Job, share: StageShare) -> list[Flow]:
    """Of one micro batch through one stage: tensor, context and expert parallelism."""
    size = stage_size(job.run, share)
    flows = [*_tensor_flows(job, share), *_context_flows(job, size), *_expert_flows(job, size)]
    return [flow for flow in flows if flow.num_calls]


def transfer_flow(job: Job) -> Flow:
    """One micro batch's activation, or its gradient, from a stage to the next; the slowest of these ways."""
    parallel = job.run.parallel
    cut = parallel.tp_size if parallel.sequence_parallel else 1
    together = 2 if job.world_size <= job.devices_per_node else 1
    return Flow("send", "pp", "activations", "forward", _activation_bytes(job) / cut, 1, 2, together)


@dataclass(frozen=True)
class _Partitioned:
    """What ZeRO partitions over one group.

    Attributes:
        held, trained, unread: numbers, those that get a gradient, and those that no backward reads.
        num_buckets, num_gathers: collectives in which all gradients are reduced, and all weights gathered.
    """

    held: int
    trained: int
    num_buckets: int
    num_gathers: int
    unread: int = 0


def data_flows(job: Job, size: StageSize) -> list[Flow]:
    """Of ZeRO, over the ranks that see other tokens: per step, and per micro batch; size: of a whole rank."""
    dense, experts = _partitioned(job, size)
    dp_and_cp = (job.data_size, max(1, min(job.data_size, job.devices_per_node // job.run.parallel.tp_size)))
    flows = list(_partition_flows(job, "dp", dense, *dp_and_cp))
    if size.expert and job.run.parallel.ep_size > 1:
        edp = job.topology["edp"].size, job.members_per_node("edp")
        flows += _partition_flows(job, "edp", experts, *edp)
    elif size.expert:
        flows += _partition_flows(job, "dp", experts, *dp_and_cp)
    return flows


def _partitioned(job: Job, size: StageSize) -> tuple[_Partitioned, _Partitioned]:
    """What experts have no part in, and they. A table larger than a bucket is reduced as it is."""
    sizes = collective_sizes(job.run, job.deepspeed, size)
    bucket, prefetch = sizes["reduce_bucket_size"], sizes.get("stage3_prefetch_bucket_size", 0)
    of_experts = 0 if job.run.lora.rank else size.expert
    of_layers = size.trained - of_experts - size.ends

    def num_gathers(held: int, num_layers: int) -> int:
        """Nothing is fetched ahead of what a layer needs if prefetch is 0."""
        return max(num_layers, ceil(held / prefetch)) if prefetch else num_layers

    return (
        _Partitioned(
            held=size.dense,
            trained=size.trained - of_experts,
            num_buckets=size.num_tables + ceil(of_layers / bucket),
            num_gathers=num_gathers(size.dense, size.num_layers),
            unread=size.tables - (size.table if job.run.task == "prefer" else 0),
        ),
        _Partitioned(
            held=size.expert,
            trained=of_experts,
            num_buckets=ceil(of_experts / bucket),
            num_gathers=num_gathers(size.expert, size.num_expert_layers),
        ),
    )


def _partition_flows(
    job: Job, axis: str, whole: _Partitioned, num_ranks: int, together: int
) -> Iterator[Flow]:
    stage, width = job.deepspeed.zero_stage, job.weight_bytes
    if num_ranks == 1:
        return
    zero = job.deepspeed.raw.get("zero_optimization") or {}
    overlaps = bool(zero.get("overlap_comm", stage == 3))
    group = num_ranks, together
    reduce: Kind = "all-reduce" if stage == 0 else "reduce-scatter"
    phase: Phase = "step" if stage < 2 else "backward_weight"
    if whole.trained:
        part = whole.trained * width / whole.num_buckets
        yield Flow(reduce, axis, "gradients", phase, part, whole.num_buckets, *group, overlaps)
    if whole.trained and stage in (1, 2):
        yield Flow("all-gather", axis, "new weights", "step", whole.trained * width, 1, *group)
    if stage == 3:
        once = job.run.parallel.parameter_gathering == "step"
        phases: tuple[Phase, ...] = ("step",) if once else ("forward", "backward_input")
        for phase in phases:
            needed = whole.held - (whole.unread if phase == "backward_input" else 0)
            part = needed * width / whole.num_gathers
            yield Flow("all-gather", axis, "weights", phase, part, whole.num_gathers, *group, True)


def _tensor_flows(job: Job, share: StageShare) -> Iterator[Flow]:
    parallel = job.run.parallel
    if parallel.tp_size == 1:
        return
    group = parallel.tp_size, job.members_per_node("tp")
    size_bytes, layers = _activation_bytes(job), len(share.layers)
    again = 2 if parallel.recompute == "full" else 1

    def flow(kind: Kind, phase: Phase, calls: int, hidden: bool = False) -> Flow:
        return Flow(kind, "tp", "activations", phase, size_bytes, calls, *group, hidden)

    ends = share.has_embedding + share.has_head
    if not parallel.sequence_parallel:
        yield flow("all-reduce", "forward", 2 * layers + share.has_embedding)
        yield flow("all-reduce", "backward_input", 2 * layers + share.has_head, True)
        if again > 1:
            yield flow("all-reduce", "backward_input", 2 * layers)
        return
    in_pieces = _num_rows_in_pieces(job, share)
    of_rows = partial(_in_pieces, number=in_pieces, pieces=parallel.row_overlap_chunks)
    whole = 2 * layers - in_pieces
    yield flow("all-gather", "forward", 2 * layers + share.has_head)
    yield from of_rows(flow("reduce-scatter", "forward", 1))
    yield flow("reduce-scatter", "forward", whole + ends)
    yield from of_rows(flow("all-gather", "backward_input", 1))
    yield flow("all-gather", "backward_input", whole + share.has_embedding)
    yield flow("reduce-scatter", "backward_input", 2 * layers, True)
    if parallel.weight_gradient_input == "gather" or not job.splits_backward:
        yield flow("all-gather", "backward_weight", 2 * layers, not job.splits_backward)  # inputs again
    if again > 1:
        yield flow("all-gather", "backward_input", 2 * layers)
        yield from of_rows(flow("reduce-scatter", "backward_input", 1))
        yield flow("reduce-scatter", "backward_input", whole)


def _num_rows_in_pieces(job: Job, share: StageShare) -> int:
    """Row layers whose sums may be scattered so: those without an adapter, of attention and of dense MLPs."""
    adapted = job.run.lora.targets if job.run.lora.rank else ()
    dense = len(share.layers) - stage_size(job.run, share).num_expert_layers
    return len(share.layers) * ("o_proj" not in adapted) + dense * ("down_proj" not in adapted)


def _in_pieces(call: Flow, number: int, pieces: int) -> Iterator[Flow]:
    """So many calls, each in pieces, which products hide but for one."""
    piece = replace(call, size_bytes=call.size_bytes / pieces)
    yield replace(piece, num_calls=number)
    if pieces > 1:
        yield replace(piece, num_calls=number * (pieces - 1), is_hidden=True)


def _context_flows(job: Job, size: StageSize) -> Iterator[Flow]:
    parallel, model = job.run.parallel, job.run.model
    ranks = parallel.cp_size
    if ranks == 1:
        return
    group = ranks, job.members_per_node("cp")
    kv_heads = max(1, model.num_key_value_heads // parallel.tp_size)
    own = 2 * job.tokens_per_micro_batch * kv_heads * model.head_dim * job.weight_bytes
    layers, what = size.num_layers, "keys and values"
    if parallel.context_attention == "heads":
        heads = model.num_attention_heads // parallel.tp_size
        rows = job.tokens_per_micro_batch * model.head_dim * 2 * (heads + kv_heads) * job.weight_bytes
        yield Flow("all-to-all", "cp", "heads", "forward", rows, layers, *group)
        yield Flow("all-to-all", "cp", "heads", "backward_input", rows, layers, *group)
        return
    is_ring = parallel.context_attention == "ring"
    in_fp32 = 4 / job.weight_bytes  # of gradients
    yield Flow("all-gather", "cp", what, "forward", ranks * own, layers, *group, is_ring)
    yield Flow("all-gather", "cp", what, "backward_input", ranks * own, layers, *group, is_ring)
    home = ranks * own * in_fp32
    yield Flow("reduce-scatter", "cp", "their gradients", "backward_input", home, layers, *group, is_ring)


def _expert_flows(job: Job, size: StageSize) -> Iterator[Flow]:
    parallel, model = job.run.parallel, job.run.model
    if parallel.ep_size == 1 or not size.num_expert_layers:
        return
    group = parallel.ep_size, job.members_per_node("ep")
    rows = job.tokens_per_micro_batch * model.num_experts_per_tok * model.hidden_size * job.weight_bytes
    calls, again = 2 * size.num_expert_layers, 2 if parallel.recompute == "full" else 1
    yield Flow("all-to-all", "ep", "tokens", "forward", rows, calls, *group)
    yield Flow("all-to-all", "ep", "tokens", "backward_input", rows, calls * again, *group)


def _activation_bytes(job: Job) -> float:
    """[s, b, h] of a rank's part of the sequence, whole over tp."""
    return job.tokens_per_micro_batch * job.run.model.hidden_size * job.weight_bytes
