"""One table of the model's tensors: name, shape, cut and kind, for every row of a Llama (pure arithmetic).

Parameters and FLOPs are counted from it, checkpoints named, Hugging Face folders written, and each stage
checks itself against it. Names and shapes are those of Hugging Face's LlamaForCausalLM, with norms of heads
of Qwen3ForCausalLM, and with experts of Glm4MoeForCausalLM; the experts of a layer are one stack here,
`[experts, out, in]`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from megalite.config.model import ModelConfig

BIAS = "e_score_correction_bias"
Kind = Literal["embedding", "head", "matrix", "expert", "norm", "bias", "adapter"]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the model.

    Attributes:
        name: Hugging Face's.
        shape: of the whole tensor, without padding.
        kind: what it is for; a "matrix" is multiplied with activations, a "head" too, of an "expert" stack
            each token uses some entries, an "adapter" is a factor beside a matrix.
        dim: the dimension that tensor parallelism cuts, None where every rank holds all of it.
        num_pieces: pieces that `dim` can be cut into at most, None for any number that divides it.
        layer: the decoder layer that it belongs to, None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    dim: int | None = None
    num_pieces: int | None = None
    layer: int | None = None

    @property
    def num_elements(self) -> int:
        """Numbers in the whole tensor."""
        return prod(self.shape)

    @property
    def cut_dims(self) -> tuple[int, ...]:
        """All dimensions that are cut: experts along their number too, by expert parallelism."""
        over_tp = () if self.dim is None else (self.dim,)
        return (*over_tp, 0) if self.kind == "expert" else over_tp

    def num_local_elements(self, tp_size: int) -> int:
        """Numbers on one of `tp_size` tensor-parallel ranks, padding not counted."""
        if self.dim is None:
            return self.num_elements
        return self.num_elements // min(tp_size, self.num_pieces or tp_size)


def model_table(config: ModelConfig) -> list[TensorRow]:
    """All tensors of a model, in the order of its layers; a tied head has no row of its own."""
    shape, width = (config.vocab_size, config.hidden_size), config.hidden_size
    rows = [TensorRow("model.embed_tokens.weight", shape, "embedding", dim=0)]
    for layer in range(config.num_hidden_layers):
        rows += layer_table(config, layer)
    rows.append(TensorRow("model.norm.weight", (width,), "norm"))
    if not config.tie_word_embeddings:
        rows.append(TensorRow("lm_head.weight", shape, "head", dim=0))
    return rows


def layer_table(config: ModelConfig, layer: int) -> list[TensorRow]:
    """The tensors of one decoder layer."""
    width = config.hidden_size
    kv_heads = config.num_key_value_heads
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, kv_heads))
    prefix = f"model.layers.{layer}"
    head_norms = ("q_norm", "k_norm") if config.use_qk_norm else ()

    def norm(name: str, size: int = width) -> TensorRow:
        return TensorRow(f"{prefix}.{name}.weight", (size,), "norm", layer=layer)

    def linear(
        name: str, out: int, into: int, dim: int, bias: bool, pieces: int | None = None
    ) -> Iterator[TensorRow]:
        yield TensorRow(f"{prefix}.{name}.weight", (out, into), "matrix", dim, pieces, layer)
        if bias:  # of a column layer it is cut as the rows are, of a row layer whole
            bias_dim = 0 if dim == 0 else None
            yield TensorRow(f"{prefix}.{name}.bias", (out,), "bias", bias_dim, pieces, layer)

    def mlp(name: str, inner: int) -> Iterator[TensorRow]:
        yield from linear(f"{name}.gate_proj", inner, width, 0, config.mlp_bias)
        yield from linear(f"{name}.up_proj", inner, width, 0, config.mlp_bias)
        yield from linear(f"{name}.down_proj", width, inner, 1, config.mlp_bias)

    def experts() -> Iterator[TensorRow]:
        number, inner = config.n_routed_experts, config.moe_intermediate_size
        assert inner is not None
        yield TensorRow(f"{prefix}.mlp.gate.weight", (number, width), "matrix", layer=layer)
        stacks = [
            ("gate_proj", inner, width, 1),
            ("up_proj", inner, width, 1),
            ("down_proj", width, inner, 2),
        ]
        for name, out, into, dim in stacks:
            full_name = f"{prefix}.mlp.experts.{name}.weight"
            yield TensorRow(full_name, (number, out, into), "expert", dim, layer=layer)
        if config.n_shared_experts:
            yield from mlp("mlp.shared_experts", config.shared_intermediate_size)

    return [
        norm("input_layernorm"),
        *linear("self_attn.q_proj", query, width, 0, config.attention_bias),
        *linear("self_attn.k_proj", key, width, 0, config.attention_bias, kv_heads),
        *linear("self_attn.v_proj", key, width, 0, config.attention_bias, kv_heads),
        *linear("self_attn.o_proj", width, query, 1, config.attention_out_bias),
        *(norm(f"self_attn.{name}", config.head_dim) for name in head_norms),
        norm("post_attention_layernorm"),
        *(experts() if config.has_experts(layer) else mlp("mlp", config.intermediate_size)),
    ]


def adapter_table(config: ModelConfig, rank: int, targets: Collection[str]) -> list[TensorRow]:
    """The factors of low-rank adapters of the linear layers that `targets` names; each as its weight is cut.

    Routers and experts have none.
    """
    rows = []
    for row in model_table(config):
        layer = row.name.removesuffix(".weight")
        if row.kind != "matrix" or row.dim is None or layer.rpartition(".")[2] not in targets:
            continue
        out, into = row.shape
        a_dim, b_dim = (1, None) if row.dim == 1 else (None, 0)
        rows += [
            TensorRow(f"{layer}.lora_A.weight", (rank, into), "adapter", a_dim, layer=row.layer),
            TensorRow(f"{layer}.lora_B.weight", (out, rank), "adapter", b_dim, row.num_pieces, row.layer),
        ]
    return rows


def adaptable_layers(config: ModelConfig) -> list[str]:
    """The names, by their last part, of linear layers that can have an adapter."""
    rows = [row for row in model_table(config) if row.kind == "matrix" and row.dim is not None]
    return list(dict.fromkeys(row.name.split(".")[-2] for row in rows))


def buffer_table(config: ModelConfig) -> list[TensorRow]:
    """Buffers that are state, fp32 in every precision: the routers' selection biases."""
    shape = (config.n_routed_experts,)
    return [
        TensorRow(f"model.layers.{layer}.mlp.gate.{BIAS}", shape, "bias", layer=layer)
        for layer in range(config.num_hidden_layers)
        if config.has_experts(layer)
    ]


def expert_names(stack: str, num_experts: int) -> list[str]:
    """Hugging Face's names of the entries of a stack of experts."""
    before, after = stack.split(".experts.")
    return [f"{before}.experts.{expert}.{after}" for expert in range(num_experts)]
