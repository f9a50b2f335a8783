"""How Megatron lays a model over ranks: which layers a stage has, which experts a rank, and what must divide.

Megatron gives all pipeline stages equally many decoder layers, but for the first and the last, which may be
told apart (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers).
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from megalite.checkpoint.format import CheckpointError
from megalite.config.model import ModelConfig


class Stage(NamedTuple):
    """What a pipeline stage holds; one of several may have no decoder layer.

    is_first: whether it has the embedding.
    is_last:  whether it has the final norm and the output layer.
    """

    rank: int
    first_layer: int
    num_layers: int
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> range:
        """Of the decoder, counted from the model's first."""
        return range(self.first_layer, self.first_layer + self.num_layers)


def stages_of(sizes: list[int]) -> list[Stage]:
    """Stages of so many layers each."""
    firsts = accumulate(sizes[:-1], initial=0)
    last = len(sizes) - 1
    return [
        Stage(rank, first, size, rank == 0, rank == last)
        for rank, (first, size) in enumerate(zip(firsts, sizes, strict=True))
    ]


def stage_sizes(
    num_layers: int, pp_size: int, first: int | None = None, last: int | None = None
) -> list[int]:
    """Decoder layers of each stage.

    first, last: of the first and the last stage. Where neither is told and the stages cannot be equal, both
    are chosen so that the largest stage is as small as it can be.

    Raises CheckpointError, with the numbers, where Megatron has no such stages.
    """
    if num_layers < pp_size:
        raise CheckpointError(
            f"pipeline parallel size {pp_size} is more than num_hidden_layers {num_layers}: "
            "some stages would be empty"
        )
    if first is None and last is None and num_layers % pp_size:
        first, last = _ends(num_layers, pp_size)
    ends = [size for size in (first, last) if size is not None]
    if len(ends) > pp_size:
        raise CheckpointError(
            f"a single stage has all {num_layers} layers: leave out those of the first and the last stage"
        )
    between, num_between = num_layers - sum(ends), pp_size - len(ends)
    if between < num_between or (between % num_between if num_between else between):
        told = " and ".join(str(size) for size in ends)
        raise CheckpointError(
            f"{num_layers} layers less {told} at the ends leave {between} for {num_between} stages, which "
            "Megatron has equal and not empty: change --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers"
        )
    equal = [between // num_between] * num_between if num_between else []
    return [*([] if first is None else [first]), *equal, *([] if last is None else [last])]


def _ends(num_layers: int, pp_size: int) -> tuple[int, int]:
    """Of the first and the last stage; those between are the largest, where that leaves enough for these."""
    largest = -(-num_layers // pp_size)
    rest = num_layers - (pp_size - 2) * largest
    if rest < 2:
        rest = num_layers - (pp_size - 2) * (largest - 1)
    return rest - rest // 2, rest // 2


class ExpertCut(NamedTuple):
    """Experts over expert-parallel ranks: consecutive ones, which are counted from 0 on each.

    num_local: experts of each rank; 0 in a model without.
    """

    ep_size: int
    num_local: int

    def place(self, expert: int | None) -> tuple[int, int] | tuple[None, None]:
        """The rank that has an expert, and its number there; nothing for what is of no expert."""
        return (None, None) if expert is None else divmod(expert, self.num_local)


def expert_cut(model: ModelConfig, ep_size: int) -> ExpertCut:
    """Raises CheckpointError where the experts are not to be shared out evenly."""
    num_experts = model.n_routed_experts
    if ep_size > 1 and not num_experts:
        raise CheckpointError(f"expert parallel size is {ep_size} and this model has no experts: use 1")
    if num_experts % ep_size:
        raise CheckpointError(
            f"expert parallel size {ep_size} does not divide n_routed_experts {num_experts}"
        )
    return ExpertCut(ep_size, num_experts // ep_size)


def padded_vocab_size(model: ModelConfig, tp_size: int, multiple: int) -> int:
    """The next multiple of multiple * tp_size."""
    unit = multiple * tp_size
    return -(-model.vocab_size // unit) * unit


def check_divides(model: ModelConfig, tp_size: int) -> None:
    """Raise CheckpointError unless heads and widths can be cut for tp_size ranks."""
    for name, size in _cut_sizes(model):
        if size % tp_size:
            raise CheckpointError(f"tensor parallel size {tp_size} does not divide {name} {size}")
    heads = model.num_key_value_heads
    if heads % tp_size and tp_size % heads:
        raise CheckpointError(
            f"tensor parallel size {tp_size} neither divides num_key_value_heads {heads} nor is a multiple"
        )


def _cut_sizes(model: ModelConfig) -> Iterator[tuple[str, int]]:
    yield "num_attention_heads", model.num_attention_heads
    if not model.has_experts(0):  # the first layers are the dense ones
        yield "intermediate_size", model.intermediate_size
    if model.n_routed_experts:
        yield "moe_intermediate_size", model.moe_intermediate_size or 0


def has_equal_layers(model: ModelConfig) -> bool:
    """Whether all layers have the same tensors: Megatron's distributed form then stacks them."""
    return not model.n_routed_experts or not model.first_k_dense_replace
