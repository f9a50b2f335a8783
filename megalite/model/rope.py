"""Rotary position embedding (Su 2021, arXiv 2104.09864), with linear and Llama-3 scaling.

Dimension j turns with j + D/2, as in Hugging Face: exported weights need no permutation. The turn itself is
in kernels/rotation.py.
"""

import math

import torch

from megalite.config.model import ModelConfig, RopeScalingConfig


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScalingConfig | None = None
) -> torch.Tensor:
    """Angle per position of each pair of dimensions, fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3_scaled(frequencies, scaling)


def _llama3_scaled(frequencies: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, those between blended (Llama 3.1 release)."""
    assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class RotaryEmbedding:
    """Cosines and sines of all positions, made at first use and kept.

    Not a module with buffers: ZeRO-3 construction and `module.bfloat16()` would round the angles.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, num_positions: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for x [s, b, heads, D], in its dtype and on its device.

        Each is [s, 1, 1, D] for positions 0 to s - 1, or [s, b, 1, D] for given positions [s, b], which are
        below s, max_position_embeddings or num_positions.
        """
        length = x.size(0)
        if positions is None:
            cos, sin = (table[:length].unsqueeze(1) for table in self._at_least(length, x))
        else:
            longest = max(length, self._config.max_position_embeddings, num_positions)
            cos, sin = (table[positions] for table in self._at_least(longest, x))
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _at_least(self, length: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The one table of a dtype and device, which has so many positions or more, [length, D] each.

        It grows to powers of two: an evaluation asks for every length, and each would leave a table.
        """
        config, key = self._config, (x.dtype, x.device)
        if key not in self._tables or len(self._tables[key][0]) < length:
            frequencies = inverse_frequencies(x.size(-1), config.rope_theta, config.rope_scaling)
            places = torch.arange(1 << (length - 1).bit_length()).float()
            angles = torch.outer(places, frequencies).repeat(1, 2)
            self._tables[key] = (angles.cos().to(x), angles.sin().to(x))
        return self._tables[key]
