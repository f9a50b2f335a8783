"""Parameters, FLOPs and memory of a model, counted on paper (pure arithmetic, no torch).

Letters: V vocabulary, h hidden, L layers, A query heads, K key-value heads, d head_dim, i MLP width,
s sequence, t tensor parallel, p pipeline parallel, n data parallel.
"""

from dataclasses import dataclass
from math import ceil

from megalite.config.deepspeed import Precision
from megalite.config.model import ModelConfig
from megalite.config.tuning import LoraConfig
from megalite.model.table import TensorRow, adapter_table, layer_table, model_table

FLOPS_FORMULA = (
    "6 x matmul parameters (output layer counted, embedding lookup and norms not; of routed experts those "
    "that a token chooses) + "
    "12 x layers x heads x head_dim x seq_length (attention in full, the causal half is not subtracted); "
    "recomputation is not counted"
)
NO_ADAPTERS = LoraConfig()

_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


def num_parameters(config: ModelConfig) -> int:
    """Numbers of the whole model without adapters; padding of the vocabulary and a tied copy not counted."""
    return sum(row.num_elements for row in model_table(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Of these the ones that take part in one token: of the routed experts those that it chooses."""
    return sum(_active(row, config) for row in model_table(config))


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Numbers in adapters beside the model, 0 for a run without."""
    return sum(row.num_elements for row in adapter_table(config, lora.rank, lora.targets))


def _active(row: TensorRow, config: ModelConfig) -> int:
    if row.kind != "expert":
        return row.num_elements
    return row.num_elements // config.n_routed_experts * config.num_experts_per_tok


def parameters_per_layer(config: ModelConfig, tp_size: int = 1, layer: int = 0) -> int:
    """Numbers of one decoder layer on one tensor-parallel rank; key and value heads have copies beyond K."""
    return sum(row.num_local_elements(tp_size) for row in layer_table(config, layer))


def flops_per_token(config: ModelConfig, seq_length: int, lora: LoraConfig = NO_ADAPTERS) -> int:
    """Floating-point operations of forward and backward for one token, by FLOPS_FORMULA.

    6 per matmul parameter and 12 L A d s for attention: PaLM (arXiv 2204.02311), appendix B. It agrees with
    equation 3 of Megatron-LM (arXiv 2104.04473) without its recomputed forward.

    Of the 6, 2 are forward's, 2 the gradient of the input and 2 that of the weight, which a frozen weight has
    none of: with adapters of N_a parameters in all it is 4 per matmul parameter + 6 N_a + 12 L A d s. (The
    first layer's inputs need no gradient then; these are counted all the same.)
    """
    frozen = 2 * _matmul_parameters(config) if lora.rank else 0
    return 3 * forward_flops_per_token(config, seq_length, lora) - frozen


def forward_flops_per_token(config: ModelConfig, seq_length: int, lora: LoraConfig = NO_ADAPTERS) -> int:
    """Of forward alone: 2 per matmul parameter, adapters among them, and 4 L A d s for attention."""
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_length
    return 2 * (_matmul_parameters(config) + num_adapter_parameters(config, lora)) + attention


def _matmul_parameters(config: ModelConfig) -> int:
    """That a token is multiplied with: of routed experts those that it chooses, and a tied head too."""
    used = [row for row in model_table(config) if row.kind in ("matrix", "expert")]
    matrices = sum(_active(row, config) for row in used)
    return matrices + config.vocab_size * config.hidden_size


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
    optimizer_bytes: float = 8,
    num_frozen_parameters: int = 0,
) -> ModelStateBytes:
    """Bytes of a rank whose stage and tensor-parallel slice hold `num_local_parameters` before ZeRO.

    num_frozen_parameters: held beside these, without gradients or state; ZeRO cuts them at stage 3 too.

    ZeRO (arXiv 1910.02054, figure 1): stage 1 cuts the optimizer over n ranks, 2 the gradients, 3 the
    parameters. The optimizer keeps `optimizer_bytes` per parameter (AdamW's two moments in fp32: 8), and an
    fp32 master copy of weights that are not fp32 themselves (see training/masters.py).
    """
    master_copy = precision != "fp32"
    optimizer = optimizer_bytes + (4 if master_copy else 0)
    sizes = (_BYTES[precision], _BYTES[grad_accum_dtype or precision], optimizer)
    cut_from_stage = (3, 2, 1)
    parts = [
        num_local_parameters * size / (dp_size if zero_stage >= stage else 1)
        for size, stage in zip(sizes, cut_from_stage, strict=True)
    ]
    frozen = num_frozen_parameters * _BYTES[precision] / (dp_size if zero_stage == 3 else 1)
    return ModelStateBytes(parts[0] + frozen, *parts[1:])


def model_state_bytes_per_rank(
    config: ModelConfig,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    dp_size: int = 1,
    zero_stage: int = 0,
    precision: Precision = "fp32",
    grad_accum_dtype: Precision | None = None,
    optimizer_bytes: float = 8,
    lora: LoraConfig = NO_ADAPTERS,
) -> ModelStateBytes:
    """Bytes of the rank that holds most, see `model_state_bytes`; the vocabulary's padding is not counted.

    With adapters the model is frozen, and they alone are trained.
    """
    weights = parameters_of_fullest_stage(config, tp_size, pp_size)
    adapters = adapters_of_fullest_stage(config, lora, tp_size, pp_size)
    return model_state_bytes(
        adapters if lora.rank else weights,
        num_frozen_parameters=weights if lora.rank else 0,
        dp_size=dp_size,
        zero_stage=zero_stage,
        precision=precision,
        grad_accum_dtype=grad_accum_dtype,
        optimizer_bytes=optimizer_bytes,
    )


def parameters_of_fullest_stage(config: ModelConfig, tp_size: int = 1, pp_size: int = 1) -> int:
    """Upper bound of the numbers on one rank before ZeRO: ceil(L/p) layers, the largest, head and last norm.

    It is one where layers are cut evenly.

    Experts are counted as on one rank: spread over ep, ZeRO-3 cuts them into as many pieces in all.
    """
    tables = 2 if pp_size == 1 and not config.tie_word_embeddings else 1
    ends = tables * config.vocab_size * config.hidden_size // tp_size + config.hidden_size
    layers = [parameters_per_layer(config, tp_size, layer) for layer in range(config.num_hidden_layers)]
    return ends + _sum_of_largest(layers, pp_size)


def adapters_of_fullest_stage(
    config: ModelConfig, lora: LoraConfig, tp_size: int = 1, pp_size: int = 1
) -> int:
    """The same of the adapters beside them."""
    layers = [0] * config.num_hidden_layers
    for row in adapter_table(config, lora.rank, lora.targets):
        assert row.layer is not None
        layers[row.layer] += row.num_local_elements(tp_size)
    return _sum_of_largest(layers, pp_size)


def _sum_of_largest(layers: list[int], pp_size: int) -> int:
    return sum(sorted(layers)[-ceil(len(layers) / pp_size) :])
