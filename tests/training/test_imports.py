"""What a rank imports until its first step is taken: nothing that a run on token files has no use for."""

import os
import subprocess
import sys

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
    "torch._inductor.compile_fx",  # two seconds of a core: DeepSpeed decorates its Muon with torch.compile
    "transformers",
    "datasets",
    "torch.utils.tensorboard",
    "lm_eval",
    "matplotlib",
    "sentencepiece",
    "pandas",
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
