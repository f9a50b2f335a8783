"""Five optimizer steps of LiteLlama-460M on two and four ranks of a CPU, ZeRO-3 in fp32, 64 tokens per rank,
parameters gathered for each micro batch and none ahead, freed blocks given back: what a rank used at its peak
beyond libraries and data, from its second step, beside what was planned for it by name; and what of that plan
is neither weights, gradients, moments nor activations, as a share of these.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement
from megalite.measure.memory_table import MEMORY_FILE
from megalite.plan.memory import MODEL_STATE

TITLE = "Memory: training steps of the 460M model"
PEER = "planned"
ROOT = Path(__file__).parent.parent
OVERRIDES = (
    "data.train=null data.seq_length=64 schedule.num_steps=5 schedule.warmup_steps=0 "
    "parallel.parameter_gathering=micro_batch logging.validate_every_steps=0 checkpoint.save_at_end=false "
    "memory.mapped_block_mib=4"
)
USEFUL = (*MODEL_STATE, "activations")


def measure() -> list[Measurement]:
    """Run the steps through the real command, and read what it writes of itself."""
    return [measurement for num_ranks in (2, 4) for measurement in of_ranks(num_ranks)]


def of_ranks(num_ranks: int) -> list[Measurement]:
    """Of the rank that took most."""
    most = max(memory_of(num_ranks), key=lambda rank: rank["peak_bytes"])
    planned = most["planned_bytes"]
    useful, whole = sum(planned[name] for name in USEFUL), sum(planned.values())
    peak = most["peak_bytes"] / 2**20
    return [
        Measurement(f"{num_ranks} ranks: peak of a rank", "MiB", peak, whole / 2**20, higher_is_better=False),
        Measurement(f"{num_ranks} ranks: beside state and activations", "%", 100 * (whole / useful - 1)),
    ]


def memory_of(num_ranks: int) -> list[dict[str, Any]]:
    """What each rank writes of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "deepspeed.json")
        settings = {
            "train_batch_size": num_ranks,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0},
        }
        config.write_text(json.dumps(settings), encoding="utf-8")
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [launcher, "--num_gpus", num_ranks, "launchers/pretrain.py", "--deepspeed_config", config]
        command += ["--config", "configs/runs/pretrain_460m.yaml", f"output_dir={folder}/run"]
        subprocess.run(
            [*map(str, command), *OVERRIDES.split()],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        ranks: list[dict[str, Any]] = json.loads(Path(folder, "run", MEMORY_FILE).read_text("utf-8"))["ranks"]
    return ranks
