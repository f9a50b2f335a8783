"""Attention of a sequence that is cut over context-parallel ranks, in any of three ways.

Shapes: s sequence, c context-parallel ranks, b micro batch, A query heads and K key/value heads of this rank,
D head size. Every way gives what one rank with the whole sequence would, documents included: who sees whom is
told by places in the whole sequence.

    gather    each rank's queries meet the keys and values of all ranks, gathered (Llama 3, arXiv 2407.21783)
    ring      the same, while keys and values go round, a rank's at a time (arXiv 2310.01889)
    heads     all-to-all: each rank has the whole sequence for A/c heads (Ulysses, arXiv 2309.14509)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from megalite.batch import Batch
from megalite.kernels.attention import Attention
from megalite.model.partial_attention import Part, Seen, attend, attend_backward, merge
from megalite.model.spans import AttentionSpans
from megalite.parallel.circulation import Gather, Ring
from megalite.parallel.mappings import exchange
from megalite.parallel.sequence import SequenceCut

CIRCULATIONS: dict[str, type[Gather] | type[Ring]] = {"gather": Gather, "ring": Ring}


@dataclass(frozen=True, kw_only=True)
class SpreadSpans(AttentionSpans):
    """The spans of this rank's tokens, whose keys and values lie on all ranks of a cut.

    starts: int64 [b or 1, s/c], places in the whole sequence.
    whole:  the spans of the whole sequence; None where attention is causal over all of it.
    way:    "gather", "ring" or "heads".
    """

    cut: SequenceCut
    whole: AttentionSpans | None
    way: str

    @classmethod
    def of_part(cls, batch: Batch, cut: SequenceCut, way: str, device: torch.device) -> "SpreadSpans":
        """The spans of a batch that `cut_sequence` has cut."""
        starts, positions = batch.document_starts, batch.positions
        if starts is None:
            own = torch.zeros(1, cut.length // cut.ranks.size, dtype=torch.int64, device=device)
        else:
            own = cut.part(starts, dim=1)
        whole = None if starts is None else AttentionSpans(starts)
        return cls(own, positions, cut=cut, whole=whole, way=way)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """query [b, A, s/c, D], key and value [b, K, s/c, D], of this rank's tokens -> [b, A, s/c, D].

        attention: who computes it where a rank has whole sequences, by "heads".
        """
        if self.way == "heads":
            return self._attend_by_heads(query, key, value, attention)
        return _AttendToAll.apply(query, key, value, self)

    def _attend_by_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        ranks = self.cut.ranks
        key, value = (_at_least(x, ranks.size) for x in (key, value))
        sizes = [x.size(1) // ranks.size for x in (query, key, value)]
        # Dimension 0: the ranks that go on with a part of the heads, then those that a part of the sequence
        # came from.
        parts = [x.unflatten(1, (ranks.size, -1)).permute(1, 3, 0, 2, 4) for x in (query, key, value)]
        all_of_some = exchange(torch.cat(parts, dim=3), ranks.group).flatten(0, 1)
        ordered = self.cut.in_order(all_of_some, dim=0).permute(1, 2, 0, 3)
        query, key, value = ordered.split(sizes, dim=1)
        mixed = attention(query, key, value, None if self.whole is None else self.whole.sight)
        some_of_all = self.cut.by_rank(mixed.permute(2, 0, 1, 3), dim=0).unflatten(0, (ranks.size, -1))
        return exchange(some_of_all, ranks.group).permute(2, 0, 3, 1, 4).flatten(1, 2)

    @property
    def num_positions(self) -> int:
        return self.cut.length

    @cached_property
    def _place(self) -> torch.Tensor:
        return self.cut.places.to(self._starts.device)

    @cached_property
    def _starts_of_chunks(self) -> dict[int, tuple[int, int]]:
        """Of this rank's chunks: the first and the last place where a document of its tokens starts.

        With documents the host waits for these numbers, once for a micro batch.
        """
        if self.whole is None:
            return dict.fromkeys(self.cut.chunks(), (0, 0))
        by_chunk = self._starts.unflatten(1, (-1, self.cut.chunk_length)).transpose(0, 1).flatten(1)
        first, last = (x.tolist() for x in (by_chunk.amin(1), by_chunk.amax(1)))
        return dict(zip(self.cut.chunks(), zip(first, last, strict=True), strict=True))

    def pairs(self, source: int) -> Iterator[tuple[slice, slice, Seen]]:
        """What of this rank's queries sees what of the keys of a rank: (queries, keys, seen), chunk by chunk.

        Of its own keys each query's own chunk comes first, so that from then on it has seen something.
        """
        chunk_length, own = self.cut.chunk_length, self.cut.chunks()
        for i, of_queries in enumerate(own):
            theirs = sorted(enumerate(self.cut.chunks(source)), key=lambda pair: pair[1] != of_queries)
            for j, of_keys in theirs:
                if self._sees(of_queries, of_keys):
                    here, there = (slice(k * chunk_length, (k + 1) * chunk_length) for k in (i, j))
                    yield here, there, self._seen(here, of_queries, of_keys)

    def _sees(self, of_queries: int, of_keys: int) -> bool:
        """Whether a token of one chunk sees one of the other."""
        first_start, _ = self._starts_of_chunks[of_queries]
        return of_keys <= of_queries and first_start < self.cut.span(of_keys).stop

    def _seen(self, here: slice, of_queries: int, of_keys: int) -> Seen:
        span = self.cut.span(of_keys)
        _, last_start = self._starts_of_chunks[of_queries]
        if of_keys < of_queries and last_start <= span.start:
            return None
        places = torch.arange(span.start, span.stop, device=self._starts.device)
        starts, own = self._starts[:, here].unsqueeze(-1), self._place[here].unsqueeze(-1)
        return ((places >= starts) & (places <= own)).unsqueeze(1)


def _at_least(heads: torch.Tensor, number: int) -> torch.Tensor:
    """Key or value heads [b, K, ...], each as often side by side as makes so many."""
    copies = max(1, number // heads.size(1))
    return heads if copies == 1 else heads.repeat_interleave(copies, dim=1)


class _AttendToAll(torch.autograd.Function):
    """Attention to the keys and values of all ranks, part by part; backward has them come once more."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: SpreadSpans
    ) -> torch.Tensor:
        ctx.spans = spans
        key_value = torch.stack([key, value])
        found: dict[int, Part] = {}  # by the first of its queries
        circulation = CIRCULATIONS[spans.way](spans.cut.ranks)
        for source, (keys, values) in circulation.parts(key_value):
            for here, there, seen in spans.pairs(source):
                part = attend(query[:, :, here], keys[:, :, there], values[:, :, there], seen)
                start = here.start
                found[start] = merge(found[start], part) if start in found else part
        out = torch.empty_like(query)  # laid out as the queries are: the next layer takes it as it lies
        torch.cat([part for part, _ in found.values()], dim=2, out=out)
        lse = torch.cat([of_part for _, of_part in found.values()], dim=2)
        ctx.save_for_backward(query, key_value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key_value, out, lse = ctx.saved_tensors
        precise = torch.promote_types(query.dtype, torch.float32)
        of_query = torch.zeros_like(query, dtype=precise)

        def contribution(source: int, part: torch.Tensor) -> torch.Tensor:
            of_part = torch.zeros_like(part, dtype=precise)
            for here, there, seen in ctx.spans.pairs(source):
                key, value = part[:, :, :, there]
                whole = (out[:, :, here], lse[:, :, here])
                dq, dk, dv = attend_backward(grad[:, :, here], query[:, :, here], key, value, whole, seen)
                of_query[:, :, here] += dq
                of_part[0][:, :, there] += dk
                of_part[1][:, :, there] += dv
            return of_part

        circulation = CIRCULATIONS[ctx.spans.way](ctx.spans.cut.ranks)
        of_key, of_value = circulation.summed(key_value, contribution).to(query)
        return of_query.to(query), of_key, of_value, None
