"""Which state an optimizer keeps for a parameter, by the optimizer's name (pure)."""

from collections.abc import Sequence

ADAM_KINDS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"
_TABLES = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")  # their rows are tokens or experts


def is_orthogonalized(name: str, full_shape: Sequence[int]) -> bool:
    """Whether Muon steps this parameter: a matrix, or a stack of experts', that maps features to features."""
    return len(full_shape) > 1 and not name.endswith(_TABLES)


def kinds_of(optimizer: str, name: str, full_shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the tensors that an optimizer keeps for a parameter, each of its shape and in fp32."""
    is_muon = optimizer == "muon" and is_orthogonalized(name, full_shape)
    return (MOMENTUM,) if is_muon else ADAM_KINDS
