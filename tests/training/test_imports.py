"""What a rank imports until its first step is taken: nothing that a run on token files has no use for."""

import gc
import os
import subprocess
import sys

import pytest

from launchers import pretrain
from megalite.training import job
from tests.launchers.jobs import ROOT

FIRST_STEP = """
import sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import megalite.training.job
from megalite.training.engine import initialize_communication
initialize_communication()
from tests.trainers import Case, build_trainer, micro_batches
trainer = build_trainer(0, Case(zero=int(sys.argv[1])))
trainer.train_step(micro_batches(0, trainer.context), 1e-3)
print("imported:", *sys.modules)
"""
USELESS = {
    "torch._dynamo",  # 1.4 seconds of a core: what keeps it out of optimizers and hooks imports it
    "torch._inductor.compile_fx",  # two seconds of a core: DeepSpeed decorates its Muon with torch.compile
    "sympy",
    "transformers",
    "datasets",
    "torch.utils.tensorboard",
    "lm_eval",
    "matplotlib",
    "sentencepiece",
    "pandas",
    "pyarrow",
    "jinja2",
    "scipy",
}


def test_the_first_step_imports_nothing_that_it_does_not_use():
    for zero in ("1", "3"):
        command = [sys.executable, "-c", FIRST_STEP, zero]
        run = subprocess.run(
            command,
            env=os.environ | {"LOCAL_RANK": "0"},  # ZeRO-3 construction asks for it
            text=True,
            stdout=subprocess.PIPE,
            check=True,
            timeout=300,
        )
        [line] = [line for line in run.stdout.splitlines() if line.startswith("imported:")]
        imported = set(line.split())
        assert {"deepspeed", "megalite.training.trainer"} <= imported
        assert not USELESS & imported


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_a_launcher_looks_for_garbage_again_once_all_is_imported(monkeypatch: pytest.MonkeyPatch):
    found = []

    def run_training(*arguments: object) -> int:
        found.append((gc.isenabled(), gc.get_freeze_count() > before))
        return 0

    monkeypatch.setattr(job, "run_training", run_training)
    for name, value in zip(LAUNCHED, ("0", "0", "1", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    before = gc.get_freeze_count()
    try:
        zero1 = str(ROOT / "configs/deepspeed/zero1.json")
        assert pretrain.main(["--deepspeed_config", zero1]) == 0
    finally:
        gc.unfreeze()
    assert found == [(True, True)]
