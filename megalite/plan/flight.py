"""Activations over one optimizer step, micro batches in flight and chunks among them (pure arithmetic)."""

from dataclasses import dataclass
from typing import NamedTuple

from megalite.parallel.vocabulary import padded_vocab_size
from megalite.pipeline.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megalite.pipeline.schedule import orders_of
from megalite.plan.activations import (
    backward_bytes,
    head_kept_bytes,
    head_working_bytes,
    layer_bytes,
    left_bytes,
    recomputed_bytes,
)
from megalite.plan.layout import RankLayout
from megalite.plan.owner import reduces_in_the_end
from megalite.plan.stage import rank_size


@dataclass(frozen=True)
class ChunkBytes:
    """Of one chunk of a rank, for one micro batch.

    Attributes:
        kept: from forward to backward.
        left: from a split backward's first part to its second.
        forward: more while forward runs.
        backward: more while backward runs.
        table: gradients of an embedding, whole at the end of a backward that reduces them at once.
    """

    kept: int
    left: int
    forward: int
    backward: int
    table: int = 0

    @classmethod
    def of(cls, layout: RankLayout, chunk: int, device: str) -> "ChunkBytes":
        """By its layers and ends."""
        share = layout.shares[chunk]
        between = layout.tokens_between * layout.run.model.hidden_size * layout.number_bytes
        kept = between + sum(layer_bytes(layout, layer, device) for layer in share.layers)
        working = max(
            backward_bytes(layout, layer, device) + recomputed_bytes(layout, layer, device)
            for layer in share.layers
        )
        return cls(
            kept + (head_kept_bytes(layout) if share.has_head else 0),
            sum(left_bytes(layout, layer, device) for layer in share.layers),
            head_working_bytes(layout) if share.has_head else backward_bytes(layout, share.layers[0], device),
            working,
            _table_gradients(layout, chunk) if layout.deepspeed.zero_stage >= 2 else 0,
        )


class Fullest(NamedTuple):
    """The moment of a step when most is held: activations, what computing takes beside them, gradients, and
    weights that ZeRO-3 has gathered.
    """

    kept: int
    working: int
    gradients: int
    gathered: int = 0


def fullest_moment(
    layout: RankLayout,
    device: str,
    gradients: int = 0,
    chunks: list[ChunkBytes] | None = None,
    *,
    reduction: int = 0,
    gathered: tuple[int, int] = (0, 0),
) -> Fullest:
    """By the order of a rank's actions.

    gradients: bytes that the first backwards of a step make, each chunk by what is trained of it; they stay
    to its end. There are none yet when all forwards have kept the most.
    reduction: what reducing them takes, within backwards or after the last of them.
    gathered: bytes of whole weights while a forward runs, and while a backward does.
    """
    in_the_end = reduces_in_the_end(layout)
    chunks = chunks or [ChunkBytes.of(layout, chunk, device) for chunk in range(len(layout.shares))]
    parallel = layout.run.parallel
    sizes = (
        parallel.pipeline_schedule,
        parallel.pp_size,
        layout.num_micro_batches,
        layout.placement.num_chunks,
    )
    orders, _ = orders_of(*sizes)
    trained = _trained(layout)
    held, made, most = 0, set[int](), Fullest(0, 0, 0)

    def of_made() -> int:
        return gradients * sum(trained[chunk] for chunk in made) // max(1, sum(trained))

    for action in orders[layout.topology.place(layout.rank, "pp")]:
        chunk, is_forward = chunks[action.chunk], isinstance(action, Forward)
        held += chunk.kept if is_forward else 0
        backward = max(chunk.backward, 0 if in_the_end else reduction)
        working, whole = (chunk.forward, gathered[0]) if is_forward else (backward, gathered[1])
        before = Fullest(held, working, of_made(), whole)
        held -= _freed(action, chunk)
        made |= {action.chunk} if isinstance(action, Backward | BackwardWeight) else set()
        at_the_end = working if is_forward or in_the_end else max(working, chunk.table + reduction)
        after = Fullest(held, at_the_end, of_made(), whole)
        most = max(most, before, after, key=sum)
    return max(most, Fullest(held, reduction, gradients, gathered[1]), key=sum)


def _trained(layout: RankLayout) -> list[int]:
    """Numbers that each chunk's first backward makes gradients of: the head's, where it shares its table."""
    sizes = [rank_size(layout.run, [share]) for share in layout.shares]
    trained = [size.trained for size in sizes]
    if layout.run.model.tie_word_embeddings and not layout.run.lora.rank:
        for chunk, share in enumerate(layout.shares):
            if share.has_head and share.has_other_end:
                trained[chunk] += sizes[chunk].table
                trained[[other.has_embedding for other in layout.shares].index(True)] -= sizes[chunk].table
    return trained


def _table_gradients(layout: RankLayout, chunk: int) -> int:
    """Bytes of an embedding's, and of a head's that is the same table and has waited for it."""
    share, model = layout.shares[chunk], layout.run.model
    if not share.has_embedding or layout.run.lora.rank:
        return 0
    number = 2 if share.has_head and model.tie_word_embeddings else 1
    table = padded_vocab_size(model.vocab_size, layout.tp_size) // layout.tp_size * model.hidden_size
    return number * table * layout.number_bytes


def _freed(action: Compute, chunk: ChunkBytes) -> int:
    """By an action, less what it leaves."""
    if isinstance(action, Forward):
        return 0
    if isinstance(action, Backward):
        return chunk.kept
    return chunk.kept - chunk.left if isinstance(action, BackwardInput) else chunk.left
