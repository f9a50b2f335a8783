"""Training of lilLM, 39.6 million parameters, on the source of Python's standard library in tokens of a BPE
of 8,192 trained on it: 60 steps of 8 samples of 256 tokens, 122,880 tokens, in bf16 on one CPU process. Muon
against AdamW, each with the best of three learning rates, the same data, 10 steps of warm-up and a cosine to
a tenth of the rate. Losses are means over the last 10 steps; the time of a step is a median.

Each run is started by the launcher's command.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measurement import Measurement
from benchmarks.optimizer_benchmark import rows_of

TITLE = "Training: Muon, lilLM"
PEER = "AdamW"
ROOT = Path(__file__).parent.parent
RATES = {"muon": (1e-3, 3e-3, 1e-2), "adamw": (1e-4, 3e-4, 1e-3)}
NUM_STEPS, NUM_LAST = 60, 10
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}
CORPUS = "from megalite.data.corpus import write_jsonl; write_jsonl({path!r})"
TOOLS = (
    "tools/train_tokenizer.py --input {0}/python.jsonl --output {0}/tokenizer --vocab-size 8192",
    "tools/preprocess_data.py --input {0}/python.jsonl --output-prefix {0}/python --tokenizer {0}/tokenizer "
    "--append-eod",
)
OVERRIDES = (
    "data.train={0}/python_text_document data.tokenizer={0}/tokenizer data.seq_length=256 "
    "output_dir={0}/{1}-{2:g} optimizer.name={1} optimizer.learning_rate={2:g} optimizer.beta2=0.95 "
    "optimizer.weight_decay=0.1 "
    "schedule.min_learning_rate={3:g} schedule.num_steps={4} schedule.warmup_steps=10 "
    "schedule.decay_steps=null "
    "checkpoint.save_every_steps=0 checkpoint.save_at_end=false logging.validate_every_steps=0"
)


def measure() -> list[Measurement]:
    """Prepare the data once, then train six times."""
    with tempfile.TemporaryDirectory() as folder:
        _run("-c", CORPUS.format(path=f"{folder}/python.jsonl"))
        for command in TOOLS:
            _run(*command.format(folder).split())
        Path(folder, "deepspeed.json").write_text(json.dumps(DEEPSPEED), encoding="utf-8")
        found = {name: {rate: _train(folder, name, rate) for rate in rates} for name, rates in RATES.items()}
    rows = [row for row in rows_of(found) if row.name != "the optimizer's part"]
    return [row._replace(unit="ms") if row.name == "a step" else row for row in rows]


def _train(folder: str, name: str, rate: float) -> tuple[float, float, float]:
    """Mean of the last losses, and the median of a step's milliseconds."""
    settings = OVERRIDES.format(folder, name, rate, rate / 10, NUM_STEPS).split()
    configs = ["--deepspeed_config", f"{folder}/deepspeed.json", "--config", "configs/runs/lillm_39m.yaml"]
    _run("launchers/pretrain.py", *configs, *settings)
    lines = Path(folder, f"{name}-{rate:g}", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    loss = statistics.mean(row["loss"] for row in rows[-NUM_LAST:])
    print(f"{name} at {rate:g}: loss {loss:.3f}", file=sys.stderr, flush=True)
    return loss, 1e3 * statistics.median(row["step_seconds"] for row in rows), 0.0


def _run(*arguments: str) -> None:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}")
