"""Initial weights, the same in every layout: each depends on seed, parameter name and place alone."""

import math

import torch

from megalite.config.model import ModelConfig
from megalite.parallel.draws import Box
from megalite.parallel.shard import Initializer, normal_initializer, uniform_initializer

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def llama_initializer(config: ModelConfig, seed: int) -> Initializer:
    """N(0, initializer_range), and 1/sqrt(2L) of it for what writes to the residual stream.

    An adapter's A is drawn as torch.nn.Linear draws, kaiming_uniform(a=sqrt(5)), U(-1/sqrt(i), 1/sqrt(i)), as
    PEFT does.

    The second keeps the stream's variance independent of depth (Radford 2019, GPT-2, section 2.3).
    """
    std = config.initializer_range
    plain = normal_initializer(seed, std)
    uniform = uniform_initializer(seed)
    residual = normal_initializer(seed, std / math.sqrt(2 * config.num_hidden_layers))

    def draw(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
        if name.endswith("lora_A.weight"):
            return uniform(name, full_shape, box)
        return (residual if name.endswith(RESIDUAL_OUTPUTS) else plain)(name, full_shape, box)

    return draw
