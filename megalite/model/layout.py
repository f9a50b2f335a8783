"""How the decoder is laid over ranks, as its layers need to know it."""

from dataclasses import dataclass, field

from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import Topology


@dataclass(frozen=True)
class StageLayout:
    """What every layer of a stage shares besides the model's own configuration.

    Attributes:
        context: the process groups; by default one process.
        sequence_parallel: activations between layers are cut along the sequence over tp_group.
        recompute: what backward computes again: "none", "selective" (attention) or "full" (blocks).
    """

    context: ParallelContext = field(default_factory=lambda: ParallelContext(Topology(world_size=1)))
    sequence_parallel: bool = False
    recompute: str = "none"
