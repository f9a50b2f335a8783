"""What the layers of a model share at their birth, in one value."""

from dataclasses import dataclass, field

import torch
from torch import nn

from megalite.kernels.choice import Kernels
from megalite.kernels.products import MatrixProducts
from megalite.parallel.context import Group, ParallelContext
from megalite.parallel.deferred import DeferredGradients
from megalite.parallel.fp8 import Cuts, Recipe, rounded_products
from megalite.parallel.mappings import copy_to_tp
from megalite.parallel.shard import Initializer, spec_of


@dataclass(frozen=True)
class Lora:
    """Adapters of linear layers, y = W x + scale B A x; see parallel/lora.py.

    Attributes:
        rank: rows of A, columns of B.
        scale: of the adapters' outputs.
        targets: the layers that have one, by the last part of their names.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class LayerPlan:
    """Where layers lie, and how their weights are made and multiplied.

    Attributes:
        context: the process groups; by default one process.
        sequence_parallel: activations between layers are cut along the sequence over tp.
        init: draws the full initial weights. By default torch's generator does, as in torch.nn, which must
            have the same seed on all ranks of a tensor-parallel group.
        dtype: of the parameters; by default torch's.
        fp8: how those of layers are rounded that are neither head nor adapter; None for not.
        kernels: what computes matrix products, attention, norms and gates.
        lora: the adapters that layers have, beside weights which then do not learn; None for none.
        tile_tokens: of a feed-forward layer at a time, on a rank; 0 for all at once.
        row_chunks: pieces in which row layers scatter their sums along the sequence, see row.py.
        deferred: where backward leaves the gradients of linear layers' weights; None computes them in it.
    """

    context: ParallelContext = field(default_factory=ParallelContext)
    sequence_parallel: bool = False
    init: Initializer | None = None
    dtype: torch.dtype | None = None
    fp8: Recipe | None = None
    kernels: Kernels = field(default_factory=Kernels)
    lora: Lora | None = None
    tile_tokens: int = 0
    row_chunks: int = 1
    deferred: DeferredGradients | None = None

    def adapts(self, name: str) -> bool:
        """Whether a layer has an adapter. name: the layer's, whole or its last part."""
        return self.lora is not None and name.rpartition(".")[2] in self.lora.targets

    @property
    def tp_group(self) -> Group:
        """The tensor-parallel group."""
        return self.context["tp"].group

    @property
    def products(self) -> MatrixProducts:
        """The matrix products that are not rounded."""
        return self.kernels.products

    def products_of(self, *, inputs_over: Group = None, outputs_over: Group = None) -> MatrixProducts:
        """The products of a linear layer whose input or output features are cut over ranks."""
        if self.fp8 is None:
            return self.products
        return rounded_products(self.fp8, Cuts(self.context["cp"].group, inputs_over, outputs_over))

    def with_whole_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The parameter, for use in a forward; backward sums its gradient where ranks have parts of it.

        Inside autograd, since ZeRO-2 and 3 reduce in gradient hooks: after backward is too late.
        """
        used: torch.Tensor = parameter
        for axis in spec_of(parameter).summed_over:
            used = copy_to_tp(used, self.context[axis].group)
        return used
