"""Seconds that a stage computes on one micro batch, without communication (no torch).

Products are FLOPs over the speed that large ones reach; attention is counted in full, as MFU counts it
(model/flops.py). The rest of a layer moves memory: bytes over the memory's bandwidth. The head with its loss
does all three of its products in the forward (docs/parallelism.md).
"""

from dataclasses import dataclass

from megalite.model.share import StageShare
from megalite.plan.job import Job
from megalite.plan.stage import stage_size

FORWARD_SHARE = 1 / 3  # of what is moved by forward and backward together
# Activations of a layer are s b h (10 + 24 / t) bytes without sequence parallelism, and 34 / t with it:
# Korthikanti 2022, arXiv 2205.05198, table 2. What is moved is divided alike.
WHOLE, CUT = 10 / 34, 24 / 34
LOSS_BYTES = 24  # six passes over fp32 logits: product, maximum, exponential, sum, gradient, product


@dataclass(frozen=True)
class Seconds:
    """Of one micro batch through one stage on one rank."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """Of all; what is computed again is part of the backward for the input."""
        return self.forward + self.backward_input + self.backward_weight


def stage_seconds(job: Job, share: StageShare) -> Seconds:
    """What a stage computes."""
    run, device, tokens = job.run, job.device, job.tokens_per_micro_batch
    size, speed = stage_size(run, share), device.flops_per_second(job.deepspeed.precision)
    of_experts = 2 * size.expert_products * tokens / (speed * device.expert_efficiency)
    products = 2 * size.products * tokens / speed + of_experts
    weights = 2 * size.trained_products * tokens / speed + (0.0 if run.lora.rank else of_experts)
    attention = size.num_layers * _attention_flops(job) / speed
    moved = size.num_layers * _moved_seconds(job)
    fixed = size.num_layers * device.layer_seconds
    forward = products + attention + FORWARD_SHARE * moved + fixed
    again = {"none": 0.0, "selective": attention, "full": forward}[run.parallel.recompute]
    return Seconds(
        forward=forward + share.has_head * _head_seconds(job, size.table),
        backward_input=products + 2 * attention + (1 - FORWARD_SHARE) * moved + fixed + again,
        backward_weight=weights + fixed,
        recomputed=again,
    )


def gathering_seconds(job: Job, num_layers: int) -> float:
    """Of a rank's step, beside communication: what ZeRO-3 does for `num_layers` layers to come and go."""
    if job.deepspeed.zero_stage < 3:
        return 0.0
    each_micro_batch = job.run.parallel.parameter_gathering == "micro_batch"
    times = 2 * job.num_micro_batches if each_micro_batch else 1  # for forward, and again for backward
    return num_layers * times * job.device.zero3_layer_seconds


def optimizer_seconds(job: Job, num_trained: int) -> float:
    """Of one step over what a rank keeps of `num_trained` parameters; bound by memory."""
    own = num_trained / (job.data_size if job.deepspeed.zero_stage else 1)
    return job.device.step_seconds + own * job.device.optimizer_bytes / _bytes_per_second(job)


def _attention_flops(job: Job) -> float:
    """Of one layer's forward: 4 s per token and query feature."""
    model, tp_size = job.run.model, job.run.parallel.tp_size
    features = model.num_attention_heads * model.head_dim / tp_size
    return 4 * job.run.data.seq_length * features * job.tokens_per_micro_batch


def _moved_seconds(job: Job) -> float:
    parallel = job.run.parallel
    cut = 1 / parallel.tp_size
    share = cut if parallel.sequence_parallel else WHOLE + CUT * cut
    features = job.run.model.hidden_size * job.tokens_per_micro_batch * job.weight_bytes / 2
    return job.device.elementwise_bytes * share * features / _bytes_per_second(job)


def _head_seconds(job: Job, table: int) -> float:
    tokens, trains = job.tokens_per_micro_batch, job.run.lora.rank == 0
    products = (6 if trains else 4) * table * tokens / job.device.flops_per_second(job.deepspeed.precision)
    logits = tokens * table / job.run.model.hidden_size
    return products + LOSS_BYTES * logits / _bytes_per_second(job)


def _bytes_per_second(job: Job) -> float:
    return job.device.memory_gb_per_second * 1e9
