"""Megatron's GPTModel in megalite's tensors: one table of names, and which rows of ours a shard is made of.

A tensor of Megatron's on one tensor-parallel rank is a stack of boxes of our tensors. `blocks` lists them in
their order; `pack` copies boxes into the stack and `unpack` gives views of it, so the two ways cannot differ.
Nothing here reads or writes a file.

    linear_qkv    for each key/value head its query heads, the key and the value; the rows are cut evenly
    linear_fc1    on each rank its rows of the gate, then the same rows of up
    embedding     rows of the padded vocabulary: those beyond ours are zeros, or are left aside on the way in
    linear_proj, linear_fc2    cut along columns
    norms, routers             whole on every rank
"""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple

import torch

from megalite.checkpoint.format import CheckpointError, Piece, Shape
from megalite.checkpoint.megatron_layout import Stage, stages_of
from megalite.checkpoint.weights import Part, model_parts
from megalite.config.model import ModelConfig

Cut = Literal["rows", "groups", "columns", "whole"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = "mlp.gate.e_score_correction_bias"


class Row(NamedTuple):
    """A kind of tensor of Megatron's.

    cut:    what tensor parallelism does with it.
    ours:   whose rows it holds; [a,b] stands for one and then the other.
    engine: its name in a model of transformer-engine layers.
    local:  in one of Megatron's own layers, where it differs.
    stored: a further name in distributed checkpoints; of experts it is one stack for all of them.
    """

    cut: Cut
    ours: str
    engine: str
    local: str = ""
    stored: str = ""


# Of these all names stand behind model.layers.N. here and decoder.layers.N. there.
ATTENTION = [
    Row(
        "whole",
        "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight",
    ),
    Row("groups", "self_attn.[q,k,v]_proj.weight", "self_attention.linear_qkv.weight"),
    Row("groups", "self_attn.[q,k,v]_proj.bias", "self_attention.linear_qkv.bias"),
    Row("whole", "self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    Row("whole", "self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
    Row("columns", "self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
    Row("whole", "self_attn.o_proj.bias", "self_attention.linear_proj.bias"),
]
DENSE = [
    Row(
        "whole",
        "post_attention_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "pre_mlp_layernorm.weight",
    ),
    Row("rows", "mlp.[gate,up]_proj.weight", "mlp.linear_fc1.weight"),
    Row("rows", "mlp.[gate,up]_proj.bias", "mlp.linear_fc1.bias"),
    Row("columns", "mlp.down_proj.weight", "mlp.linear_fc2.weight"),
    Row("whole", "mlp.down_proj.bias", "mlp.linear_fc2.bias"),
]
EXPERTS = [
    Row(
        "whole",
        "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight",
        stored="mlp.linear_fc1.layer_norm_weight",
    ),
    Row("whole", "mlp.gate.weight", "mlp.router.weight"),
    Row("whole", BIAS, "mlp.router.expert_bias"),
    Row(
        "rows",
        "mlp.experts.{expert}.[gate,up]_proj.weight",
        "mlp.experts.linear_fc1.weight{expert}",
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "mlp.experts.experts.linear_fc1.weight",
    ),
    Row(
        "columns",
        "mlp.experts.{expert}.down_proj.weight",
        "mlp.experts.linear_fc2.weight{expert}",
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        "mlp.experts.experts.linear_fc2.weight",
    ),
    Row("rows", "mlp.shared_experts.[gate,up]_proj.weight", "mlp.shared_experts.linear_fc1.weight"),
    Row("columns", "mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight"),
]
FIRST = Row("rows", EMBEDDING, "embedding.word_embeddings.weight")
LAST = [
    Row("whole", "model.norm.weight", "decoder.final_layernorm.weight"),
    Row("rows", HEAD, "output_layer.weight"),
]
TIED_COPY = Row("rows", EMBEDDING, "output_layer.weight")  # the last of several stages has one of its own


class Tensor(NamedTuple):
    """One tensor of Megatron's model.

    row, layer, expert: which one, counted from the model's first.
    parts: whose rows it holds.
    """

    row: Row
    parts: tuple[Part, ...]
    layer: int | None = None
    expert: int | None = None

    @property
    def is_copy(self) -> bool:
        """Whether another tensor holds the same."""
        return self.row is TIED_COPY

    @property
    def of_expert(self) -> bool:
        """Whether it belongs to one of the routed experts."""
        return self.expert is not None

    @property
    def spellings(self) -> list[str]:
        """All names that it may have: transformer engine's, local, stored; {layer} and {expert} are open."""
        return [self._of_layer(name) for name in (self.row.engine, self.row.local, self.row.stored) if name]

    def spelling(self, *, local: bool) -> str:
        """Its name in a model of Megatron's own layers, or in one of transformer engine's."""
        return self._of_layer((local and self.row.local) or self.row.engine)

    def stored_spelling(self, *, local: bool) -> str:
        """Its name in a distributed checkpoint of such a model."""
        row = self.row
        return self._of_layer((row.stored if local or self.of_expert else "") or row.engine)

    def named(self, spelling: str, first_layer: int = 0, expert: int | None = None) -> str:
        """A spelling as it is in the file of a stage that begins with `first_layer`.

        expert: its number there, where it is not that of the model.
        """
        layer = None if self.layer is None else self.layer - first_layer
        return spelling.format(layer=layer, expert=self.expert if expert is None else expert)

    def _of_layer(self, name: str) -> str:
        return name if self.layer is None else "decoder.layers.{layer}." + name


def megatron_tensors(model: ModelConfig, stage: Stage | None = None) -> list[Tensor]:
    """The tensors of a pipeline stage, by default of the whole model.

    Raises CheckpointError when the model has a tensor that Megatron's has no place for.
    """
    [whole] = stages_of([model.num_hidden_layers])
    held = stage or whole
    parts = {part.name: part for part in model_parts(model)}
    tensors = [_tensor(FIRST, parts)] if held.is_first else []
    for layer in held.layers:
        for row in ATTENTION + (EXPERTS if model.has_experts(layer) else DENSE):
            experts = range(model.n_routed_experts) if "{expert}" in row.ours else [None]
            tensors += [_tensor(row, parts, layer, expert) for expert in experts]
    if held.is_last:
        copy = [TIED_COPY] if model.tie_word_embeddings and not held.is_first else []
        tensors += [_tensor(row, parts) for row in LAST + copy]
    found = [tensor for tensor in tensors if tensor.parts]
    if held == whole:
        _check_complete(found, parts)
    return found


def _tensor(row: Row, parts: dict[str, Part], layer: int | None = None, expert: int | None = None) -> Tensor:
    """Without parts where the model has none of them."""
    listed = re.search(r"\[(.*)\]", row.ours)
    names = [row.ours.replace(listed[0], name) for name in listed[1].split(",")] if listed else [row.ours]
    prefix = "" if layer is None else f"model.layers.{layer}."
    ours = [prefix + name.replace("{expert}", str(expert)) for name in names]
    return Tensor(row, tuple(parts[name] for name in ours if name in parts), layer, expert)


def _check_complete(tensors: list[Tensor], parts: dict[str, Part]) -> None:
    placed = {part.name for tensor in tensors for part in tensor.parts}
    for name in parts.keys() - placed:
        raise CheckpointError(f"Megatron's GPTModel has no place for {name}: this model cannot be converted")


# Shards


class Layout(NamedTuple):
    """How a model lies on tensor-parallel ranks.

    padded_vocab_size: rows of the embedding, a multiple of tp_size.
    """

    tp_size: int
    padded_vocab_size: int


class Block(NamedTuple):
    """A box of one of our tensors, in the part's own shape."""

    part: Part
    start: Shape
    shape: Shape

    @property
    def box(self) -> tuple[Shape, Shape]:
        """Start and shape of it in the checkpoint's tensor, which may be a stack of experts."""
        if self.part.entry is None:
            return self.start, self.shape
        return (self.part.entry, *self.start), (1, *self.shape)

    def piece(self, tensor: torch.Tensor) -> Piece:
        """`tensor`, which is this box, as a piece of a checkpoint."""
        part = self.part
        return Piece(part.tensor, part.kind, part.full_shape, *self.box, 0, tensor.reshape(-1))


def blocks(tensor: Tensor, model: ModelConfig, layout: Layout, tp_rank: int) -> list[Block]:
    """The boxes of ours that a rank's shard of a tensor consists of, from its first row to its last."""
    cut, parts = tensor.row.cut, tensor.parts
    if cut == "whole":
        return [Block(part, (0,) * len(part.shape), part.shape) for part in parts]
    if cut == "columns":
        [part] = parts
        width = part.shape[1] // layout.tp_size
        return [Block(part, (0, tp_rank * width), (part.shape[0], width))]
    stacks = [_groups(parts, model)] if cut == "groups" else [[(part, 0, part.shape[0])] for part in parts]
    bands = chain.from_iterable(
        _cut(stack, _num_rows(stack, layout), layout.tp_size, tp_rank) for stack in stacks
    )
    return [Block(p, (first, *(0 for _ in p.shape[1:])), (rows, *p.shape[1:])) for p, first, rows in bands]


Band = tuple[Part, int, int]  # first row and number of rows


def _groups(parts: tuple[Part, ...], model: ModelConfig) -> list[Band]:
    """For each key/value head its query heads, its key, its value."""
    heads = model.num_attention_heads // model.num_key_value_heads, 1, 1
    rows = [num * model.head_dim for num in heads]
    return [
        (part, group * num, num)
        for group in range(model.num_key_value_heads)
        for part, num in zip(parts, rows, strict=True)
    ]


def _num_rows(stack: list[Band], layout: Layout) -> int:
    if stack[0][0].name in (EMBEDDING, HEAD):
        return layout.padded_vocab_size
    return sum(rows for _, _, rows in stack)


def _cut(stack: list[Band], num_rows: int, tp_size: int, tp_rank: int) -> Iterator[Band]:
    """This rank's rows of a stack; one that is padded ends before `num_rows`."""
    share = num_rows // tp_size
    begin, end, at = tp_rank * share, (tp_rank + 1) * share, 0
    for part, first, rows in stack:
        low, high = max(begin, at), min(end, at + rows)
        if low < high:
            yield part, first + low - at, high - low
        at += rows


def shard_shape(tensor: Tensor, layout: Layout) -> Shape:
    """Of the tensor on each rank, padding included."""
    cut, (rows, *rest) = tensor.row.cut, tensor.parts[0].shape
    if cut == "whole":
        return (rows, *rest)
    if cut == "columns":
        return rows, rest[0] // layout.tp_size
    bands = [(part, 0, part.shape[0]) for part in tensor.parts]
    return _num_rows(bands, layout) // layout.tp_size, *rest


def pack(shape: Shape, boxes: list[torch.Tensor]) -> torch.Tensor:
    """A shard of its boxes, filled up with rows of zeros."""
    shard = torch.cat(boxes) if boxes else torch.zeros(0, *shape[1:])
    missing = shape[0] - len(shard)
    return torch.cat([shard, shard.new_zeros(missing, *shape[1:])]) if missing else shard


def unpack(shard: torch.Tensor, blocks: list[Block]) -> Iterator[tuple[Block, torch.Tensor]]:
    """Each box and its view of a shard; padding is left over."""
    at = 0
    for block in blocks:
        yield block, shard[at : at + block.shape[0]]
        at += block.shape[0]
