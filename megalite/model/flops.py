"""Parameters, FLOPs and memory of a model, counted on paper (pure arithmetic, no torch).

Letters: V vocabulary, h hidden, L layers, A query heads, K key-value heads, d head_dim, i MLP width,
s sequence, t tensor parallel, p pipeline parallel, n data parallel.
"""

from dataclasses import dataclass
from math import ceil

from megalite.config.deepspeed import Precision
from megalite.config.model import ModelConfig
from megalite.model.table import TensorRow, layer_table, model_table

FLOPS_FORMULA = (
    "6 x matmul parameters (output layer counted, embedding lookup and norms not; of routed experts those "
    "that a token chooses) + "
    "12 x layers x heads x head_dim x seq_length (attention in full, the causal half is not subtracted); "
    "recomputation is not counted"
)

_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers of the whole model; the vocabulary's padding and a tied head's copy not counted."""
    return sum(row.num_elements for row in model_table(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Of these the ones that take part in one token: of the routed experts those that it chooses."""
    return sum(_active(row, config) for row in model_table(config))


def _active(row: TensorRow, config: ModelConfig) -> int:
    if row.kind != "expert":
        return row.num_elements
    return row.num_elements // config.n_routed_experts * config.num_experts_per_tok


def parameters_per_layer(config: ModelConfig, tp_size: int = 1, layer: int = 0) -> int:
    """Numbers of one decoder layer on one tensor-parallel rank; key and value heads have copies beyond K."""
    return sum(row.num_local_elements(tp_size) for row in layer_table(config, layer))


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating-point operations of forward and backward for one token, by FLOPS_FORMULA.

    6 per matmul parameter and 12 L A d s for attention: PaLM (arXiv 2204.02311), appendix B. It agrees with
    equation 3 of Megatron-LM (arXiv 2104.04473) without its recomputed forward.
    """
    used = [row for row in model_table(config) if row.kind in ("matrix", "expert")]
    matrices = sum(_active(row, config) for row in used)
    head = config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_length
    return 6 * (matrices + head) + attention


@dataclass(frozen=True)
class ModelStateBytes:
    """What one rank holds of the model between steps, in bytes; activations and buffers come on top."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def model_state_bytes(
    num_local_parameters: int,
    *,
    dp_size: int,
    zero_stage: int,
    precision: Precision,
    grad_accum_dtype: Precision | None = None,
    optimizer_bytes: int = 8,
) -> ModelStateBytes:
    """Bytes of a rank whose stage and tensor-parallel slice hold `num_local_parameters` before ZeRO.

    ZeRO (arXiv 1910.02054, figure 1): stage 1 cuts the optimizer over n ranks, 2 the gradients, 3 the
    parameters. The optimizer keeps `optimizer_bytes` per parameter (AdamW's two moments in fp32: 8), and an
    fp32 master copy of the weights. DeepSpeed makes that copy at stages 1 and 2 even when the weights are
    fp32 themselves; at stage 3 it then shares them.
    """
    master_copy = precision != "fp32" or zero_stage in (1, 2)
    optimizer = optimizer_bytes + (4 if master_copy else 0)
    sizes = (_BYTES[precision], _BYTES[grad_accum_dtype or precision], optimizer)
    cut_from_stage = (3, 2, 1)
    parts = [
        num_local_parameters * size / (dp_size if zero_stage >= stage else 1)
        for size, stage in zip(sizes, cut_from_stage, strict=True)
    ]
    return ModelStateBytes(*parts)


def model_state_bytes_per_rank(
    config: ModelConfig,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    dp_size: int = 1,
    zero_stage: int = 0,
    precision: Precision = "fp32",
    grad_accum_dtype: Precision | None = None,
    optimizer_bytes: int = 8,
) -> ModelStateBytes:
    """Bytes of the rank that holds most, see `model_state_bytes`; the vocabulary's padding is not counted."""
    return model_state_bytes(
        parameters_of_fullest_stage(config, tp_size, pp_size),
        dp_size=dp_size,
        zero_stage=zero_stage,
        precision=precision,
        grad_accum_dtype=grad_accum_dtype,
        optimizer_bytes=optimizer_bytes,
    )


def parameters_of_fullest_stage(config: ModelConfig, tp_size: int = 1, pp_size: int = 1) -> int:
    """Upper bound of the numbers on one rank before ZeRO: ceil(L/p) layers, the largest, head and last norm.

    Experts are counted as on one rank: spread over ep, ZeRO-3 cuts them into as many pieces in all.
    """
    tables = 2 if pp_size == 1 and not config.tie_word_embeddings else 1
    ends = tables * config.vocab_size * config.hidden_size // tp_size + config.hidden_size
    layers = [parameters_per_layer(config, tp_size, layer) for layer in range(config.num_hidden_layers)]
    return ends + sum(sorted(layers)[-ceil(len(layers) / pp_size) :])
