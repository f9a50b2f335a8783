"""Nothing is made on another device than the run's, and nothing in a step makes the host wait for it.

The stage, the loss and the optimizer of a run are walked on fake tensors of torch's `meta` device, which
stands for a GPU: an operation on tensors of two devices raises, and so does one whose result the host must
look at (a fake tensor has no numbers). What DeepSpeed does in between is not walked.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megalite.batch import Batch
from megalite.model import rope
from megalite.model.balancing import RULES, ExpertBalancing
from megalite.model.llama import LlamaStage
from megalite.optimizer.adamw import AdamW
from megalite.parallel.context import ParallelContext
from megalite.parallel.plan import LayerPlan
from megalite.pipeline.schedule import placement_of
from megalite.plan.layout import shares_of_rank
from megalite.training.objective import build_objective
from megalite.training.trainer import adapters_of
from tests.trainers import MODELS, Case, run_config

DEVICE = torch.device("meta")
ROWS, LENGTH = 2, 16
CASES = {
    **{name: Case(model_kind=name) for name in MODELS},
    "tied": Case(tied=True),
    "recomputed attention": Case(recompute="selective"),
    "recomputed blocks": Case(recompute="full", model_kind="experts"),
    "inputs in host memory": Case(recompute="full", offload=True, tile=8),
    "quantile": Case(model_kind="experts", rule="quantile"),
}


def on_device(stage: nn.Module) -> nn.Module:
    """The stage with fake tensors in place of its own, with their specs, which Module.to() would drop."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            made[tensor] = new = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
            if isinstance(tensor, nn.Parameter):
                made[tensor] = new = nn.Parameter(new, tensor.requires_grad)
            new.__dict__.update(tensor.__dict__)
        return made[tensor]

    for module in stage.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})
    return stage


def batch_of(task: str, *, documents: bool, padded: bool) -> Batch:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=DEVICE)
    batch = Batch(input_ids=ids, labels=ids, document_starts=ids if documents else None)
    batch = replace(batch, padding=ids.bool()) if padded else batch
    references = torch.zeros(ROWS, device=DEVICE)
    return replace(batch, references=references) if task == "prefer" else batch


def step(case: Case, dtype: torch.dtype, task: str = "pretrain", **batch: bool) -> nn.Module:
    """Two micro batches and an optimizer step on the device."""
    run = run_config(case, task=task) if task != "pretrain" else run_config(case)
    context = ParallelContext(device=DEVICE)
    stages = context["pp"]
    plan = LayerPlan(context, dtype=dtype, lora=adapters_of(run), tile_tokens=case.tile)
    (share,) = shares_of_rank(run, placement_of(run.parallel.pipeline_schedule, stages.size), stages.rank)
    with torch.device("cpu"):
        parallel = run.parallel
        options = {"recompute": parallel.recompute, "offload": parallel.offload_activations}
        stage = LlamaStage(run.model, plan, share, **options)
    with FakeTensorMode():
        objective = build_objective(run, context)
        stage.loss = objective.loss
        on_device(stage)
        balancing = None
        if run.model.n_routed_experts:
            rule = RULES[run.balancing.rule](run.balancing, run.model)
            balancing = ExpertBalancing(run.model, stage.routers(), rule, context)
            balancing.begin_step(1.0)
        recipe = AdamW(run.optimizer)
        optimizer = recipe.build(recipe.groups(list(stage.parameters())))
        for group in optimizer.param_groups:
            group["fused"] = False  # torch fuses for devices that it knows
        for _ in range(2):
            given = batch_of(task, documents=batch.get("documents", False), padded=batch.get("padded", False))
            loss = stage(None, given)
            (loss / objective.count(given)).backward()
        optimizer.step()
        assert loss.device == DEVICE
    return stage


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_on_its_device_and_the_host_does_not_wait(name, documents):
    stage = step(CASES[name], torch.bfloat16, documents=documents, padded=documents)
    gradients = {p.grad.device for p in stage.parameters() if p.grad is not None}
    assert gradients == {DEVICE}
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)


def test_control_a_tensor_on_the_cpu_is_found(monkeypatch):
    """The control: tables of angles that stay where they were made."""

    def tables(self, x, positions=None):
        angles = torch.zeros(x.size(0), 1, 1, x.size(-1), dtype=x.dtype)
        return angles, angles

    monkeypatch.setattr(rope.RotaryEmbedding, "tables", tables)
    with pytest.raises(RuntimeError, match="two devices, meta and cpu"):
        step(Case(), torch.bfloat16)


def test_control_a_host_that_looks_at_a_number_is_found(monkeypatch):
    """The control: a loss that is read at once."""
    stage = LlamaStage.forward

    def forward(self, x, batch):
        loss = stage(self, x, batch)
        loss.item()
        return loss

    monkeypatch.setattr(LlamaStage, "forward", forward)
    with pytest.raises(DataDependentOutputException):
        step(Case(), torch.bfloat16)
