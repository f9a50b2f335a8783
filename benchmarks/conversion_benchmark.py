"""tools/convert_from_hf.py and tools/convert_to_hf.py, each a process of its own, its start in the time and
the comparison at the end left out (--no-verify), against a plain copy of the files that it reads, synced, in
turns. A folder in bf16 is imported into a checkpoint, and that is exported again. The folder is Llama 2's 7B
with as many of its 32 layers as the free disk has room for, a sparse file of zeros. Memory is the converter's
own at its peak, without the files that it maps. Each round removes what it wrote: a disk that grows as it is
filled is slow where it is written for the first time.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.measurement import Measurement
from megalite.checkpoint.hf_config import hf_config
from megalite.checkpoint.weights import model_parts
from megalite.config.model import ModelConfig
from megalite.model.flops import num_parameters

TITLE = "Conversion"
PEER = "a file copy"
ROOT = Path(__file__).resolve().parents[1]
NUM_LAYERS = (32, 16, 8, 4, 2, 1)
TIMES_THE_FOLDER = 3  # the checkpoint, and a copy or the export; the folder takes no room
FREE_SHARE = 0.6  # that may be used
CHUNK_BYTES = 1 << 24
NUM_ROUNDS = 3
LOOK_EVERY_SECONDS = 0.02


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    peak_bytes: int


def largest_that_fits(free_bytes: int) -> ModelConfig:
    """Llama 2's 7B, or fewer layers of it. Raises RuntimeError when there is no room for one."""
    for num_layers in NUM_LAYERS:
        model = ModelConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        )
        needed = 2 * num_parameters(model) * TIMES_THE_FOLDER
        if needed < FREE_SHARE * free_bytes:
            return model
    raise RuntimeError(f"{free_bytes:,} bytes are free, {needed / FREE_SHARE:,.0f} are needed: make room")


def write_folder(folder: Path, model: ModelConfig) -> None:
    """config.json, and one file of zeros that takes no room."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model, "bfloat16")), encoding="utf-8")
    header, end = {}, 0
    for part in model_parts(model):
        start, end = end, end + 2 * _num_elements(part.shape)
        header[part.name] = {"dtype": "BF16", "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _num_elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def run_command(*arguments: str) -> Cost:
    """Run a tool to its end. Raises RuntimeError when it fails."""
    started, peak = time.perf_counter(), 0
    command = [sys.executable, *arguments, "--no-verify"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            peak = max(peak, _own_bytes(process.pid))
            time.sleep(LOOK_EVERY_SECONDS)
        errors = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {errors[-500:]}")
    return Cost(time.perf_counter() - started, peak)


def _own_bytes(pid: int) -> int:
    """Memory of a process that is no mapped file (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def copy_seconds(source: Path, target: Path) -> float:
    """Of a copy of all files of a folder; the copy is removed afterwards."""
    started = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reading, (target / path.name).open("wb") as writing:
            while chunk := reading.read(CHUNK_BYTES):
                writing.write(chunk)
            writing.flush()
            subprocess.run(["sync", str(target / path.name)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def in_turns(name: str, source: Path, target: Path, *command: str) -> list[Measurement]:
    """Speed beside a copy's, and memory, of a command that reads `source` and writes `target`."""
    copies, costs = [], []
    for _ in range(NUM_ROUNDS):
        copies.append(copy_seconds(source, target.with_name("copy")))
        shutil.rmtree(target, ignore_errors=True)
        costs.append(run_command(*command))
    megabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    speeds = megabytes / median(cost.seconds for cost in costs), megabytes / median(copies)
    peak = max(cost.peak_bytes for cost in costs) / 1e6
    memory = Measurement(f"{name}, peak memory", "MB", peak, None, higher_is_better=False)
    return [Measurement(f"{name} of {megabytes:,.0f} MB", "MB/s", *speeds), memory]


def measure() -> list[Measurement]:
    """Both ways."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder, checkpoints, exported = root / "folder", root / "checkpoints", root / "exported"
        write_folder(folder, largest_that_fits(shutil.disk_usage(root).free))
        there = ["tools/convert_from_hf.py", "--model", str(folder), "--output", str(checkpoints)]
        found = in_turns("import", folder, checkpoints, *there)
        back = ["tools/convert_to_hf.py", "--checkpoint", str(checkpoints), "--output", str(exported)]
        return found + in_turns(
            "export", checkpoints / "step-00000000", exported, *back, "--tokenizer", "none"
        )
