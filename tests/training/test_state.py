"""Frozen parameters and buffers that are state: stepped, counted, saved, loaded and resharded right.

The model is a Llama whose first layer's query weight and all of whose norms are frozen, with an fp32 buffer
per layer that each forward moves. In bf16 the buffer must stay fp32.
"""

from functools import cache

import pytest
import torch

from megalite.checkpoint.load import TensorReader
from megalite.config.checkpoint import CheckpointConfig
from megalite.model.llama import LlamaStage
from megalite.parallel.shard import register_state, spec_of, state_buffers, whole_spec
from megalite.training import trainer as trainer_module
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, deepspeed_config, micro_batches, run_config

FROZEN = "model.layers.0.self_attn.q_proj.weight"
STOP, LAST = 2, 4
CASES = [
    Case(tp=2, dp=2, zero=0),
    Case(tp=2, dp=2, zero=1),
    Case(tp=2, pp=2, zero=2),
    Case(pp=2, dp=2, zero=3),
    Case(dp=2, zero=1, precision="bf16"),
    Case(tp=2, dp=2, zero=3, precision="bf16"),
]


class PartlyFrozen(LlamaStage):
    """Counts its forwards in training, per layer, by thirds, which bf16 cannot hold."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for parameter in self.parameters():
            spec = spec_of(parameter)
            if spec.name == FROZEN or len(spec.full_shape) == 1:
                parameter.requires_grad_(False)
        for number, block in self.layers.items():
            context, name = block.mlp.down_proj.plan.context, f"model.layers.{number}.forwards"
            register_state(block, "forwards", whole_spec(context, name, (3,), is_summed=False))

    def forward(self, x, batch):
        if torch.is_grad_enabled():
            for block in self.layers.values():
                block.forwards += 1 / 3
        return super().forward(x, batch)


def train(rank, case, folder, first, last, save_at=None):
    """Losses and norms of steps first to last, after resuming; the buffers at the end."""
    initialize_communication()
    trainer_module.LlamaStage = PartlyFrozen
    run = run_config(case, output_dir=str(folder), checkpoint=CheckpointConfig(save_every_steps=STOP))
    trainer = build_trainer(rank, case)
    checkpoints = Checkpoints(run, deepspeed_config(case), rank, lambda text: None)
    assert checkpoints.resume(trainer.engine) == first - 1
    curve = []
    for step in range(first, last + 1):
        result = trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
        curve.append((result.loss, result.grad_norm))
        if step == save_at:
            checkpoints.save(trainer.engine, step)
    buffers = {spec_of(b).name: b.clone() for b in state_buffers(trainer.engine.module)}
    return curve, buffers


def initial_weights(case):
    return {p.spec.name: p.detach() for p in LlamaStage(case.model, seed=run_config(case).seed).parameters()}


@cache
def reference_norm():
    """The first step's norm over the parameters that are trained, by autograd in one process."""
    from tests.reference import mean_loss, transformers_model
    from tests.trainers import MODEL, SEED, global_batch

    llama = transformers_model(MODEL, SEED)
    mean_loss(llama, global_batch(1)).backward()
    trained = [p.grad for name, p in llama.named_parameters() if p.dim() > 1 and name != FROZEN]
    return sum(grad.double().square().sum() for grad in trained).sqrt().item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_parameters_and_buffers_are_counted_saved_and_resumed(case, tmp_path):
    whole, buffers = run_distributed(train, case.world_size, case, tmp_path, 1, LAST, STOP)[0]
    tolerance = 0.05 if case.precision == "bf16" else 1e-5
    assert whole[0][1] == pytest.approx(reference_norm(), rel=tolerance)

    reader = TensorReader(tmp_path / f"checkpoints/step-{STOP:08d}")
    initial = initial_weights(case)[FROZEN]
    expected = initial.bfloat16().float() if case.precision == "bf16" else initial
    assert torch.equal(reader.read("weight", FROZEN), expected)
    assert not torch.equal(reader.read("weight", FROZEN.replace("q_proj", "k_proj")), expected[:16])
    names = reader.manifest.shapes("buffer")
    assert sorted(names) == [f"model.layers.{i}.forwards" for i in range(4)]
    num_micro_batches = 4 // case.dp
    thirds = sum([torch.tensor(1 / 3)] * (STOP * num_micro_batches))
    for name in names:
        torch.testing.assert_close(reader.read("buffer", name), thirds.expand(3), rtol=1e-6, atol=0)

    resumed, after = run_distributed(train, case.world_size, case, tmp_path, STOP + 1, LAST)[0]
    assert resumed == whole[STOP:]
    assert all(torch.equal(after[name], buffers[name]) for name in buffers)


def test_another_layout_takes_over_frozen_parameters_and_buffers(tmp_path):
    before, after = Case(tp=2, dp=2, zero=3), Case(tp=2, pp=2, zero=1)
    whole, _ = run_distributed(train, 4, before, tmp_path, 1, LAST, STOP)[0]
    moved, _ = run_distributed(train, 4, after, tmp_path, STOP + 1, LAST)[0]
    torch.testing.assert_close(torch.tensor(moved), torch.tensor(whole[STOP:]), rtol=1e-4, atol=0)
