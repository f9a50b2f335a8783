"""Seconds from the command to what it says of its first step: `deepspeed --num_gpus 2 launchers/pretrain.py`
with the model of 2M parameters, configs/deepspeed/zero3.json and a token file that is there, beside a step of
torch's own layers, as deep and as many samples, in DeepSpeed's engine, by the same command. Files are cached:
each was started once before.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measurement import Measurement, middle_half
from megalite.data.indexed_writer import IndexedDatasetWriter

TITLE = "Start: to the end of the first step"
PEER = "bare DeepSpeed"
ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS, ROUNDS = 2, 4
NUM_TOKENS, VOCAB_SIZE = 100_000, 256
FIRST_STEP = re.compile(r"step 1\b")


def measure() -> list[Measurement]:
    """Medians of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "tokens")
        with IndexedDatasetWriter(prefix) as writer:
            ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, NUM_TOKENS, dtype=np.uint16)
            writer.add_documents(ids, np.full(NUM_TOKENS // 1000, 1000))
        ours = [
            "launchers/pretrain.py",
            *("--deepspeed_config", "configs/deepspeed/zero3.json"),
            f"data.train={prefix}",
            *("schedule.num_steps=1", "logging.validate_every_steps=0", "checkpoint.save_every_steps=0"),
        ]
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(1 + ROUNDS):
            scripts = {
                "ours": [*ours, f"output_dir={folder}/run{number}"],  # one that is there goes on
                "theirs": ["benchmarks/bare_deepspeed.py"],
            }
            for name, script in scripts.items():
                taken = seconds_to_first_step(script)
                if number > 0:  # the first reads files
                    seconds[name].append(taken)
    print(f"{TITLE}: {seconds}", file=sys.stderr, flush=True)
    advantages = [theirs / own for own, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    own, theirs = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    name, spread = "2 ranks, ZeRO-3, 16 samples", middle_half(advantages)
    return [Measurement(name, "s", own, theirs, higher_is_better=False, spread=spread)]


def seconds_to_first_step(script: list[str]) -> float:
    """Until the job says that its first step is over; it is left to end by itself.

    Raises:
        RuntimeError: it ended before.
    """
    command = ["deepspeed", "--num_gpus", str(NUM_RANKS), *script]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    started, output = time.perf_counter(), []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            output.append(line)
            if FIRST_STEP.match(line):
                seconds = time.perf_counter() - started
                job.stdout.read()
                return seconds
    raise RuntimeError(f"{' '.join(command)} made no step:\n{''.join(output[-20:])}")
