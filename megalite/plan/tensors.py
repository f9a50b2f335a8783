"""The weights of one rank before ZeRO, as numbers (pure arithmetic)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from megalite.config.model import ModelConfig
from megalite.model.table import TensorRow, adapter_table, model_table
from megalite.parallel.vocabulary import padded_vocab_size
from megalite.plan.layout import RankLayout

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class LocalTensor:
    """What one rank has of a tensor of the model.

    Attributes:
        row: the whole.
        numel: numbers of this rank's part, the vocabulary's padding among them.
        num_data_ranks: that ZeRO partitions it over.
        is_trained: adapters alone are, where there are any.
    """

    row: TensorRow
    numel: int
    num_data_ranks: int
    is_trained: bool

    @property
    def partition_numel(self) -> int:
        """Numbers of one of the equal parts that ZeRO-3 makes of it, padding among them."""
        return ceil(self.numel / self.num_data_ranks)


def tensors_of_rank(layout: RankLayout) -> list[LocalTensor]:
    """All of a rank's, of all its chunks; a tied table is there once."""
    return list(
        {t.row.name: t for chunk in range(len(layout.shares)) for t in of_chunk(layout, chunk)}.values()
    )


def of_chunk(layout: RankLayout, chunk: int) -> list[LocalTensor]:
    """Those that a chunk computes with, in the order of its layers."""
    run, share = layout.run, layout.shares[chunk]
    tied = run.model.tie_word_embeddings
    ends = {EMBEDDING: share.has_embedding or (share.has_head and tied)}
    ends |= {NORM: share.has_head, HEAD: share.has_head}
    rows = _table(run.model)
    adapters = adapter_table(run.model, run.lora.rank, run.lora.targets) if run.lora.rank else []
    return [
        _local(layout, row, is_trained=row in adapters or not run.lora.rank)
        for row in [*rows, *adapters]
        if (row.layer in share.layers if row.layer is not None else ends[row.name])
    ]


@lru_cache(maxsize=8)  # a search for layouts asks thousands of times
def _table(model: ModelConfig) -> tuple[TensorRow, ...]:
    return tuple(model_table(model))


def unread_in_backward(layout: RankLayout) -> set[str]:
    """Tables that backward needs no numbers of; a head whose losses stay apart computes logits again."""
    if layout.run.task != "prefer":
        return {EMBEDDING, HEAD}
    has_head = any(share.has_head for share in layout.shares)
    return set() if layout.run.model.tie_word_embeddings and has_head else {EMBEDDING}


def modules_of(tensors: Iterable[LocalTensor]) -> Iterator[list[LocalTensor]]:
    """The tensors that are gathered together: of one module, such as query, key and value."""
    modules: dict[str, list[LocalTensor]] = {}
    for tensor in tensors:
        modules.setdefault(_module_of(tensor.row.name), []).append(tensor)
    yield from modules.values()


def _module_of(name: str) -> str:
    merged = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    if ".experts." in name:
        return name.rpartition(".experts.")[0]
    owner, _, layer = name.rpartition(".")[0].rpartition(".")
    return f"{owner}.{merged.get(layer, layer)}"


def _local(layout: RankLayout, row: TensorRow, is_trained: bool) -> LocalTensor:
    tp_size, ep_size = layout.tp_size, layout.run.parallel.ep_size
    numel = row.num_local_elements(tp_size)
    if row.kind in ("embedding", "head"):
        numel = padded_vocab_size(row.shape[0], tp_size) // tp_size * row.shape[1]
    if row.kind == "expert":
        return LocalTensor(row, numel // ep_size, layout.num_expert_data_ranks, is_trained)
    return LocalTensor(row, numel, layout.num_data_ranks, is_trained)
