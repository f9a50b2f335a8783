"""What a rank holds of the model, as the numbers that work and communication are reckoned from (no torch)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.model.share import StageShare
from megalite.model.table import adapter_table, layer_table

Adapters = tuple[int, tuple[str, ...]]  # rank and targets
NO_ADAPTERS: Adapters = (0, ())


@dataclass(frozen=True)
class StageSize:
    """Of one share of the model on one tensor-parallel rank, before ZeRO; experts divided by ep.

    Attributes:
        num_layers, num_expert_layers: decoder layers, and those of them with routed experts.
        dense, expert: numbers in all parameters, adapters among them.
        products: numbers that each token is multiplied with in decoder layers, those of experts left out.
        expert_products: those of the routed experts that it chooses.
        trained_products: of `products` the ones that get a gradient.
        trained: numbers that get a gradient, experts among them.
        table: of the embedding's or the head's table, where it is here.
        tables: numbers of the tables of embedding and head.
        num_tables, ends: tables of embedding and head that get a gradient; all such numbers not in layers.
    """

    num_layers: int = 0
    num_expert_layers: int = 0
    dense: int = 0
    expert: int = 0
    products: int = 0
    expert_products: int = 0
    trained_products: int = 0
    trained: int = 0
    table: int = 0
    tables: int = 0
    num_tables: int = 0
    ends: int = 0

    def __add__(self, other: "StageSize") -> "StageSize":
        return StageSize(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, number: int) -> "StageSize":
        """As many of them."""
        return StageSize(*(number * value for value in _values(self)))

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.dense + self.expert


def stage_size(run: RunConfig, share: StageShare) -> StageSize:
    """The sizes of one share."""
    return _cached_stage_size(run.model, run.parallel.tp_size, run.parallel.ep_size, _adapters(run), share)


def rank_size(run: RunConfig, shares: Iterable[StageShare]) -> StageSize:
    """The sizes of all shares of a rank together."""
    return sum((stage_size(run, share) for share in shares), StageSize())


def largest_layer(run: RunConfig, size: StageSize) -> int:
    """Numbers that get a gradient in the largest decoder layer of a rank. size: of all of its shares."""
    sizes = run.model, run.parallel.tp_size, run.parallel.ep_size, _adapters(run)
    num_dense_layers = size.num_layers - size.num_expert_layers
    kinds = [False] * (num_dense_layers > 0) + [True] * (size.num_expert_layers > 0)
    return max(_layer_size(*sizes, has_experts).trained for has_experts in kinds)


def _adapters(run: RunConfig) -> Adapters:
    return (run.lora.rank, tuple(run.lora.targets)) if run.lora.rank else NO_ADAPTERS


@lru_cache(maxsize=65536)  # a search asks of few shares for many layouts
def _cached_stage_size(
    model: ModelConfig, tp_size: int, ep_size: int, lora: Adapters, share: StageShare
) -> StageSize:
    num_expert_layers = sum(map(model.has_experts, share.layers)) if model.n_routed_experts else 0
    layers = StageSize()
    for has_experts, number in ((False, len(share.layers) - num_expert_layers), (True, num_expert_layers)):
        if number:
            layers += _layer_size(model, tp_size, ep_size, lora, has_experts).times(number)
    table = model.vocab_size * model.hidden_size // tp_size
    is_one_table = model.tie_word_embeddings and (share.has_embedding or share.has_other_end)
    tables = share.has_embedding + (share.has_head and not is_one_table)
    ends = tables * table + share.has_head * model.hidden_size
    sizes = StageSize(dense=ends, table=table if share.has_head else 0, tables=tables * table)
    if not lora[0]:
        sizes += StageSize(trained=ends, num_tables=tables, ends=ends)
    return layers + sizes


@lru_cache(maxsize=4096)
def _layer_size(
    model: ModelConfig, tp_size: int, ep_size: int, lora: Adapters, has_experts: bool
) -> StageSize:
    number = next(n for n in range(model.num_hidden_layers) if model.has_experts(n) == has_experts)
    rows = layer_table(model, number)
    adapters = [row for row in adapter_table(model, *lora) if row.layer == number] if lora[0] else []
    dense = sum(row.num_local_elements(tp_size) for row in [*rows, *adapters] if row.kind != "expert")
    expert = sum(row.num_local_elements(tp_size) for row in rows if row.kind == "expert") // ep_size
    products = sum(row.num_local_elements(tp_size) for row in rows if row.kind == "matrix")
    chosen = expert * ep_size // max(1, model.n_routed_experts) * model.num_experts_per_tok
    of_adapters = sum(row.num_local_elements(tp_size) for row in adapters)
    return StageSize(
        num_layers=1,
        num_expert_layers=int(has_experts),
        dense=dense,
        expert=expert,
        products=products + of_adapters,
        expert_products=chosen,
        trained_products=of_adapters if lora[0] else products,
        trained=of_adapters if lora[0] else dense + expert,
    )


_values = attrgetter(*StageSize.__dataclass_fields__)
