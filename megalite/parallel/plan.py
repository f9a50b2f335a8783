"""What the layers of a model share at their birth, in one value."""

from dataclasses import dataclass, field

import torch
from torch import nn

from megalite.parallel.context import Group, ParallelContext
from megalite.parallel.mappings import copy_to_tp
from megalite.parallel.products import MatrixProducts
from megalite.parallel.shard import Initializer, spec_of


@dataclass(frozen=True)
class LayerPlan:
    """Where layers lie, and how their weights are made and multiplied.

    Attributes:
        context: the process groups; by default one process.
        sequence_parallel: activations between layers are cut along the sequence over tp.
        init: draws the full initial weights. By default torch's generator does, as in torch.nn, which must
            have the same seed on all ranks of a tensor-parallel group.
        dtype: of the parameters; by default torch's.
        products: the matrix products of linear layers.
    """

    context: ParallelContext = field(default_factory=ParallelContext)
    sequence_parallel: bool = False
    init: Initializer | None = None
    dtype: torch.dtype | None = None
    products: MatrixProducts = field(default_factory=MatrixProducts)

    @property
    def tp_group(self) -> Group:
        """The tensor-parallel group."""
        return self.context["tp"].group

    def with_whole_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The parameter, for use in a forward; backward sums its gradient where ranks have parts of it.

        Inside autograd, since ZeRO-2 and 3 reduce in gradient hooks: after backward is too late.
        """
        used: torch.Tensor = parameter
        for axis in spec_of(parameter).summed_over:
            used = copy_to_tp(used, self.context[axis].group)
        return used
