"""One optimizer step of LiteLlama-460M on two ranks of a CPU, ZeRO-3 in fp32, 64 tokens per rank, parameters
gathered for each micro batch: what a rank used at its peak beyond libraries and data, beside the model state
alone (parameters, gradients and optimizer, by arXiv 1910.02054). The rest is a whole embedding and its
gradient, DeepSpeed's reduction buckets and a second copy of the gradients for the optimizer.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measurement import Measurement

TITLE = "Memory: a training step of the 460M model"
PEER = "theory"
ROOT = Path(__file__).parent.parent
DEEPSPEED = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 50_000_000},
}
OVERRIDES = (
    "data.train=null data.seq_length=64 schedule.num_steps=1 schedule.warmup_steps=0 "
    "parallel.parameter_gathering=micro_batch logging.validate_every_steps=0 checkpoint.save_at_end=false"
)
REPORT = re.compile(r"([\d,]+) MiB of it since the model was made; in theory ([\d,]+) MiB")


def measure() -> list[Measurement]:
    """Run the step through the real command, and read what it reports of itself."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "deepspeed.json")
        config.write_text(json.dumps(DEEPSPEED), encoding="utf-8")
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [launcher, "--num_gpus", "2", "launchers/pretrain.py", "--deepspeed_config", config]
        command += ["--config", "configs/runs/pretrain_460m.yaml", f"output_dir={folder}/run"]
        output = subprocess.run(
            [*map(str, command), *OVERRIDES.split()],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    found = REPORT.search(output)
    if found is None:
        raise RuntimeError(f"the run reported no memory:\n{output}")
    measured, theory = (float(text.replace(",", "")) for text in found.groups())
    return [Measurement("peak of a rank", "MiB", measured, theory, higher_is_better=False)]
