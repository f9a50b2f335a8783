"""What is planned: a run, its DeepSpeed JSON, and the machine; which rank sits where follows (no torch).

Letters: p stages' ranks, v chunks per rank, t tensor, c context, d data parallel.
"""

from dataclasses import dataclass
from functools import cached_property

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.device import DeviceConfig
from megalite.config.run import RunConfig
from megalite.config.section import ConfigError
from megalite.model.share import StageShare
from megalite.parallel.topology import Topology
from megalite.pipeline.orders import RULES
from megalite.pipeline.placement import Placement
from megalite.plan.layout import NUMBER_BYTES, check_stages, grid_of, shares_of_rank, stages_of


@dataclass(frozen=True)
class Job:
    """A run on a cluster."""

    run: RunConfig
    deepspeed: DeepSpeedConfig
    device: DeviceConfig
    num_nodes: int
    devices_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.devices_per_node

    @cached_property
    def topology(self) -> Topology:
        """The grid of all ranks."""
        return grid_of(self.run, self.world_size)

    @cached_property
    def placement(self) -> Placement:
        """How the stages lie on the ranks of a pipeline."""
        return stages_of(self.run)

    @property
    def dp_size(self) -> int:
        """Ranks with other samples."""
        return self.topology["dp"].size

    @property
    def data_size(self) -> int:
        """Ranks that ZeRO partitions over: dp x cp."""
        return self.topology["dp"].size * self.topology["cp"].size

    @cached_property
    def num_micro_batches(self) -> int:
        """Of one optimizer step, per data-parallel rank."""
        return self.deepspeed.num_micro_batches(self.dp_size)

    @property
    def splits_backward(self) -> bool:
        """Whether weights' gradients are computed apart."""
        return RULES[self.run.parallel.pipeline_schedule].splits_backward

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.deepspeed.train_batch_size * self.run.tokens_per_sample

    @property
    def tokens_per_micro_batch(self) -> int:
        """On one rank: its part of the sequence, of each sample."""
        micro = self.deepspeed.train_micro_batch_size_per_gpu
        return micro * self.run.tokens_per_sample // self.run.parallel.cp_size

    @property
    def kernels(self) -> str:
        """Whose: "cuda" or "cpu"."""
        return "cuda" if self.device.processors_per_node is None else "cpu"

    @property
    def weight_bytes(self) -> int:
        """Of one number of the weights and activations in forward and backward."""
        return NUMBER_BYTES[self.deepspeed.precision]

    def shares(self, pp_rank: int) -> list[StageShare]:
        """What of the model lies on a rank of the pipeline, chunk by chunk."""
        return shares_of_rank(self.run, self.placement, pp_rank)

    def members_per_node(self, axis: str) -> int:
        """Ranks of one group along an axis that share a node."""
        size, stride = self.topology[axis]
        return max(1, min(size, self.devices_per_node // stride))


def check_job(job: Job) -> None:
    """Raise ConfigError, in one line, where the run does not exist on so many devices."""
    run, parallel = job.run, job.run.parallel
    dp_size = run.dp_size_of(job.world_size)
    run.check_zero_stage(job.deepspeed.zero_stage)
    run.check_optimizer(job.deepspeed.raw)
    job.deepspeed.num_micro_batches(dp_size)
    check_stages(run)
    if parallel.tp_size > job.devices_per_node:
        raise ConfigError(
            f"parallel.tp_size {parallel.tp_size} exceeds the {job.devices_per_node} devices of a node, and "
            "its traffic would cross the network in every layer: use a tp_size within a node"
        )
