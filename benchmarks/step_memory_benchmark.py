"""One optimizer step of LiteLlama-460M on two ranks of a CPU, ZeRO-3 in fp32, 64 tokens per rank, parameters
gathered for each micro batch: what a rank used at its peak beyond libraries and data, from its second step,
beside the model state alone (parameters, gradients and optimizer, by arXiv 1910.02054). The rest is a whole
embedding and its gradient, activations and buckets.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measurement import Measurement
from megalite.measure.memory_table import MEMORY_FILE
from megalite.plan.memory import MODEL_STATE

TITLE = "Memory: a training step of the 460M model"
PEER = "theory"
ROOT = Path(__file__).parent.parent
DEEPSPEED = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
}
OVERRIDES = (
    "data.train=null data.seq_length=64 schedule.num_steps=2 schedule.warmup_steps=0 "
    "parallel.parameter_gathering=micro_batch logging.validate_every_steps=0 checkpoint.save_at_end=false"
)


def measure() -> list[Measurement]:
    """Run the steps through the real command, and read what it writes of itself."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "deepspeed.json")
        config.write_text(json.dumps(DEEPSPEED), encoding="utf-8")
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [launcher, "--num_gpus", "2", "launchers/pretrain.py", "--deepspeed_config", config]
        command += ["--config", "configs/runs/pretrain_460m.yaml", f"output_dir={folder}/run"]
        subprocess.run(
            [*map(str, command), *OVERRIDES.split()],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        ranks = json.loads(Path(folder, "run", MEMORY_FILE).read_text(encoding="utf-8"))["ranks"]
    most = max(ranks, key=lambda rank: rank["peak_bytes"])
    state = sum(most["planned_bytes"][name] for name in MODEL_STATE)
    measured, theory = most["peak_bytes"] / 2**20, state / 2**20
    return [Measurement("peak of a rank", "MiB", measured, theory, higher_is_better=False)]
