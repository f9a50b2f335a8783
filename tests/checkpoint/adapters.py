"""Tiny adapters of random weights: checkpoints of them, and megalite's model with them beside its layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.base import BASE, Base
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.config.tuning import LoraConfig
from megalite.model.llama import LlamaStage
from megalite.parallel.plan import LayerPlan, Lora
from megalite.parallel.shard import spec_of, state_buffers
from tests.checkpoint.llamas import random_llama, save_llama, tensors_of, tiny_run
from tests.checkpoint.worlds import Tensors, cut_all, even_cut, save_world

LORA = LoraConfig(rank=3, alpha=7.0)
# How transformers' models name what may have an adapter; a router and routed experts have none.
LAYERS = ("self_attn.", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.shared_experts.")


@dataclass(frozen=True)
class Tuned:
    """A checkpoint of adapters, and what it was made of."""

    run: RunConfig
    llama: Any  # the base, of transformers
    base: Path
    factors: dict[str, torch.Tensor]
    checkpoint: Path


def random_factors(llama: Any, lora: LoraConfig = LORA, seed: int = 5) -> dict[str, torch.Tensor]:
    """A and B beside each linear layer that is a target; B is not zero, so that all of it counts."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in llama.named_modules():
        is_layer = isinstance(module, torch.nn.Linear) and any(part in name for part in LAYERS)
        if is_layer and name.rpartition(".")[2] in lora.targets:
            shapes = {"A": (lora.rank, module.in_features), "B": (module.out_features, lora.rank)}
            for factor, shape in shapes.items():
                found[f"{name}.lora_{factor}.weight"] = torch.randn(shape, generator=generator) / 6
    return found


def save_tuned(folder: Path, variant: str = "plain", lora: LoraConfig = LORA) -> Tuned:
    """folder/base/checkpoints/step-10, as by tp 2 x dp 2, and folder/tuned/checkpoints/step-4, as by dp 3."""
    run = tiny_run(variant)
    llama = random_llama(run.model)
    base = save_llama(folder / "base" / "checkpoints", llama, run)
    run = run.model_copy(update={"lora": lora})
    factors = random_factors(llama, lora)
    return Tuned(run, llama, base, factors, save_factors(folder / "tuned", run, base, factors))


def save_factors(folder: Path, run: RunConfig, base: Path, factors: dict[str, torch.Tensor]) -> Path:
    tensors: Tensors = {("weight", name): tensor for name, tensor in factors.items()}
    tensors |= {("exp_avg", name): torch.zeros_like(tensor) for name, tensor in factors.items()}
    ranks = cut_all(tensors, lambda name, full: even_cut(None, dp_size=3))
    state = {"step": 4, BASE: Base.of(base).record(folder)}
    return save_world(folder / "checkpoints", 4, ranks, state, {"config.yaml": dump_run(run)})


def merged(tuned: Tuned) -> Tensors:
    """W + scale B A in float64, by hand."""
    lora, tensors = tuned.run.lora, tensors_of(tuned.llama)
    scale = lora.alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)
    for name in tuned.factors:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            b, a = (tuned.factors[f"{layer}.lora_{factor}.weight"].double() for factor in "BA")
            weight = tensors["weight", f"{layer}.weight"]
            tensors["weight", f"{layer}.weight"] = weight.double() + scale * b @ a
    return tensors


@torch.no_grad()
def unmerged_stage(tuned: Tuned, factors: dict[str, torch.Tensor]) -> LlamaStage:
    """megalite's model with adapters beside its layers, filled by hand."""
    lora = tuned.run.lora
    plan = LayerPlan(dtype=torch.float32, lora=Lora(lora.rank, lora.scale, tuple(lora.targets)))
    stage = LlamaStage(tuned.run.model, plan).eval()
    tensors = {name: tensor for (_, name), tensor in tensors_of(tuned.llama).items()} | factors
    for tensor in [*stage.parameters(), *state_buffers(stage)]:
        full = tensors.pop(spec_of(tensor).name)
        tensor.zero_()
        tensor[tuple(map(slice, full.shape))] = full
    assert not tensors
    return stage
