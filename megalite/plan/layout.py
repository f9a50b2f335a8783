"""What one rank of a run is: its place, its stages, and how much of a step it computes (pure arithmetic)."""

from dataclasses import dataclass
from functools import cached_property

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.config.section import ConfigError
from megalite.model.share import StageShare
from megalite.parallel.topology import DATA_AXES, Topology
from megalite.pipeline.partition import layers_of_stage
from megalite.pipeline.placement import Placement
from megalite.pipeline.schedule import placement_of

NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class RankLayout:
    """One rank among `world_size`.

    Raises ConfigError or ScheduleError where the run does not lie on so many ranks.
    """

    run: RunConfig
    deepspeed: DeepSpeedConfig
    world_size: int
    rank: int

    @cached_property
    def topology(self) -> Topology:
        """The grid of all ranks."""
        self.run.dp_size_of(self.world_size)  # raises where it does not fit
        return grid_of(self.run, self.world_size)

    @cached_property
    def placement(self) -> Placement:
        """Where stages lie."""
        return stages_of(self.run)

    @cached_property
    def shares(self) -> list[StageShare]:
        """What the chunks of this rank hold of the model."""
        return shares_of_rank(self.run, self.placement, self.topology.place(self.rank, "pp"))

    @property
    def tp_size(self) -> int:
        """Ranks that share each layer."""
        return self.run.parallel.tp_size

    @property
    def num_data_ranks(self) -> int:
        """Ranks that ZeRO partitions over."""
        dp, cp = (self.topology[axis].size for axis in DATA_AXES)
        return dp * cp

    @property
    def num_expert_data_ranks(self) -> int:
        """Those that it partitions experts over."""
        return self.topology["edp"].size

    @property
    def num_micro_batches(self) -> int:
        """Of an optimizer step."""
        return self.deepspeed.num_micro_batches(self.topology["dp"].size)

    @property
    def number_bytes(self) -> int:
        """Of a weight or an activation."""
        return NUMBER_BYTES[self.deepspeed.precision]

    @property
    def gradient_bytes(self) -> int:
        """Of a number of a summed gradient."""
        return NUMBER_BYTES[self.deepspeed.grad_accum_dtype or self.deepspeed.precision]

    @property
    def rows(self) -> int:
        """Sequences of a micro batch."""
        return self.deepspeed.train_micro_batch_size_per_gpu * self.run.rows_per_sample

    @property
    def seq_length(self) -> int:
        """Tokens of this rank's part of a sequence."""
        return self.run.data.seq_length // self.run.parallel.cp_size

    @property
    def tokens(self) -> int:
        """Of a micro batch, in a layer."""
        return self.rows * self.seq_length

    @property
    def tokens_between(self) -> int:
        """Of a micro batch between layers: a part of these under sequence parallelism."""
        return self.tokens // (self.tp_size if self.run.parallel.sequence_parallel else 1)


def grid_of(run: RunConfig, world_size: int) -> Topology:
    """The grid of all ranks, copies of key/value heads left out."""
    parallel = run.parallel
    sizes = {"tp_size": parallel.tp_size, "pp_size": parallel.pp_size, "cp_size": parallel.cp_size}
    return Topology(world_size, **sizes, ep_size=parallel.ep_size)


def stages_of(run: RunConfig) -> Placement:
    """How the stages lie on the ranks of a pipeline."""
    parallel = run.parallel
    return placement_of(parallel.pipeline_schedule, parallel.pp_size, parallel.num_chunks)


def check_stages(run: RunConfig) -> None:
    """Raise ScheduleError for chunks that a schedule does not have, ConfigError for unfit layers."""
    name, layers, placement = run.parallel.pipeline_schedule, run.model.num_hidden_layers, stages_of(run)
    if layers < placement.num_stages:
        raise ConfigError(
            f"parallel.pp_size {placement.num_ranks} x {placement.num_chunks} chunks of pipeline_schedule "
            f"{name} exceeds model.num_hidden_layers {layers}: use at most {layers} in all"
        )
    sizes = run.parallel.layers_per_stage
    if sizes is not None and len(sizes) != placement.num_stages:
        raise ConfigError(
            f"parallel.layers_per_stage has {len(sizes)} numbers, and pp_size {placement.num_ranks} x "
            f"{placement.num_chunks} chunks of pipeline_schedule {name} are "
            f"{placement.num_stages} stages: give one number for each"
        )
    if sizes is not None and sum(sizes) != layers:
        raise ConfigError(
            f"parallel.layers_per_stage adds up to {sum(sizes)}, and model.num_hidden_layers is {layers}: "
            "share out all layers"
        )


def shares_of_rank(run: RunConfig, placement: Placement, rank: int) -> list[StageShare]:
    """What the chunks of a rank of the pipeline hold of the model."""
    layers, sizes, last = run.model.num_hidden_layers, run.parallel.layers_per_stage, placement.num_stages - 1
    stages = [placement.stage(rank, chunk) for chunk in range(placement.num_chunks)]
    return [
        StageShare(
            layers_of_stage(layers, placement.num_stages, stage, sizes=sizes),
            has_embedding=stage == 0,
            has_head=stage == last,
            has_other_end=last > 0 and {0, last} <= set(stages) and stage in (0, last),
        )
        for stage in stages
    ]
