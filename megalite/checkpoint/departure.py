"""Where two implementations of a model part: the first of its parts whose outputs differ."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from megalite.checkpoint.model import megalite_logits
from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage

PARTS_OF_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
See = Callable[[str, torch.Tensor], None]


class Departure(NamedTuple):
    """The first part of a model after which two implementations differ.

    name:       transformers' of that part.
    difference: the largest, as a share of the largest number of transformers' output.
    """

    name: str
    difference: float

    def __str__(self) -> str:
        return f"first differs after {self.name}, by {self.difference:.1e} relative"


@torch.no_grad()
def find_departure(ours: LlamaStage, theirs: Any, tokens: torch.Tensor, tolerance: float) -> Departure | None:
    """Run both on tokens [b, s] and compare what each part gives; None where all stay within the tolerance.

    Memory: the outputs of all parts of one of them.
    """
    expected: dict[str, torch.Tensor] = {}
    departures: list[Departure] = []

    def compare(name: str, output: torch.Tensor) -> None:
        want = expected[name]
        found = output.transpose(0, 1)[..., : want.size(-1)]  # ours are [s, b, h], the vocabulary padded
        difference = ((found - want).abs().max() / want.abs().max()).item()
        if not difference <= tolerance:
            departures.append(Departure(name, difference))

    names = part_names(ours.config)
    with ExitStack() as hooks:
        _watch(hooks, {name: theirs.get_submodule(name) for name in names}, expected.__setitem__)
        theirs(tokens)
    with ExitStack() as hooks:
        _watch(hooks, {name: ours.get_submodule(name.removeprefix("model.")) for name in names}, compare)
        megalite_logits(ours, tokens)
    return departures[0] if departures else None


def part_names(model: ModelConfig) -> list[str]:
    """transformers' names of the parts that are compared, in the order in which they compute."""
    layers = range(model.num_hidden_layers)
    parts = [f"model.layers.{layer}.{part}" for layer in layers for part in PARTS_OF_LAYER]
    return ["model.embed_tokens", *parts, "model.norm", "lm_head"]


def _watch(hooks: ExitStack, modules: dict[str, torch.nn.Module], see: See) -> None:
    """Show what each module gives, of a tuple the first."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, output[0] if isinstance(output, tuple) else output)

    for name, module in modules.items():
        hooks.callback(module.register_forward_hook(hook(name)).remove)
