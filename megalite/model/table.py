"""One table of the model's tensors: name, shape, cut and kind, for every row of a Llama (pure arithmetic).

Parameters and FLOPs are counted from it, checkpoints named, Hugging Face folders written, and each stage
checks itself against it. Names and shapes are those of Hugging Face's LlamaForCausalLM.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from megalite.config.model import ModelConfig

Kind = Literal["embedding", "head", "matrix", "norm", "bias"]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the model.

    Attributes:
        name: Hugging Face's.
        shape: of the whole tensor, without padding.
        kind: what it is for; a "matrix" is multiplied with activations, a "head" too.
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
    width, inner = config.hidden_size, config.intermediate_size
    kv_heads = config.num_key_value_heads
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, kv_heads))
    prefix = f"model.layers.{layer}"

    def norm(name: str) -> TensorRow:
        return TensorRow(f"{prefix}.{name}.weight", (width,), "norm", layer=layer)

    def linear(
        name: str, out: int, into: int, dim: int, bias: bool, pieces: int | None = None
    ) -> Iterator[TensorRow]:
        yield TensorRow(f"{prefix}.{name}.weight", (out, into), "matrix", dim, pieces, layer)
        if bias:  # of a column layer it is cut as the rows are, of a row layer whole
            bias_dim = 0 if dim == 0 else None
            yield TensorRow(f"{prefix}.{name}.bias", (out,), "bias", bias_dim, pieces, layer)

    return [
        norm("input_layernorm"),
        *linear("self_attn.q_proj", query, width, 0, config.attention_bias),
        *linear("self_attn.k_proj", key, width, 0, config.attention_bias, kv_heads),
        *linear("self_attn.v_proj", key, width, 0, config.attention_bias, kv_heads),
        *linear("self_attn.o_proj", width, query, 1, config.attention_bias),
        norm("post_attention_layernorm"),
        *linear("mlp.gate_proj", inner, width, 0, config.mlp_bias),
        *linear("mlp.up_proj", inner, width, 0, config.mlp_bias),
        *linear("mlp.down_proj", width, inner, 1, config.mlp_bias),
    ]
