"""tools/convert_from_hf.py and tools/convert_to_hf.py, each a process of its own, its start in the time and
the comparison with transformers left out (--no-verify), against `cp` of the files that it reads, synced, in
turns. A folder in bf16 is imported into a checkpoint, whose checksums are made, and that is exported again,
whose checksums are verified. The folder is Llama 2's 7B, random, with as many of its 32 layers as the free
disk has room for. What a command or `cp` reads is not in the page cache when it starts; MB are of that.
Memory is the converter's at its peak, with all files that it maps. At the end the export equals the folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.measurement import Measurement, middle_half
from megalite.checkpoint.hf_config import hf_config
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.weights import model_parts
from megalite.config.model import ModelConfig
from megalite.files import sync
from megalite.model.flops import num_parameters

TITLE = "Conversion"
PEER = "cp and fsync"
ROOT = Path(__file__).resolve().parents[1]
NUM_LAYERS = (32, 16, 8, 4, 2, 1)
TIMES_THE_FOLDER = 3  # itself, the checkpoint, and a copy or the export
FREE_SHARE = 0.8  # that may be used
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
    """config.json, and one file of random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model, "bfloat16")), encoding="utf-8")
    header, end = {}, 0
    for part in model_parts(model):
        start, end = end, end + 2 * _num_elements(part.shape)
        header[part.name] = {"dtype": "BF16", "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = torch.randn(25_000_003).bfloat16().view(torch.uint8).numpy().data  # no tensor is like another
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(random)):
            file.write(random[: end - start])


def _num_elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def settle(folder: Path) -> None:
    """All that was written is on the disk, and the folder's files are nowhere else."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_command(*arguments: str) -> Cost:
    """Run a tool to its end. Raises RuntimeError when it fails."""
    started, peak = time.perf_counter(), 0
    command = [sys.executable, *arguments, "--no-verify"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(LOOK_EVERY_SECONDS)
        seconds = time.perf_counter() - started
        errors = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {errors[-500:]}")
    return Cost(seconds, peak)


def _peak_bytes(pid: int) -> int:
    """The most memory of a process so far, mapped files and all (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def copy_seconds(source: Path, target: Path) -> float:
    """Of a copy of all files of a folder, until it is on the disk; it is removed afterwards."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            sync(file)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def in_turns(name: str, source: Path, target: Path, *command: str) -> list[Measurement]:
    """Speed beside a copy's, and memory, of a command that reads `source` and writes `target`."""
    copies, costs = [], []
    for _ in range(NUM_ROUNDS):
        shutil.rmtree(target, ignore_errors=True)
        settle(source)
        copies.append(copy_seconds(source, target.with_name("copy")))
        settle(source)
        costs.append(run_command(*command))
        print(f"{name}: cp {copies[-1]:.1f} s, {costs[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    megabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    speeds = megabytes / median(cost.seconds for cost in costs), megabytes / median(copies)
    ratios = [copy / cost.seconds for copy, cost in zip(copies, costs, strict=True)]
    peak = max(cost.peak_bytes for cost in costs) / 1e6
    return [
        Measurement(f"{name} of {megabytes:,.0f} MB", "MB/s", *speeds, spread=middle_half(ratios)),
        Measurement(f"{name}, peak memory", "MB", peak, None, higher_is_better=False),
    ]


def check_equal(exported: Path, folder: Path) -> None:
    """Raise RuntimeError unless both hold the same tensors, bit for bit."""
    ours, theirs = HFFolder(exported).tensors, HFFolder(folder).tensors
    bits = torch.int16
    if ours.keys() != theirs.keys() or not all(ours[k].view(bits).equal(theirs[k].view(bits)) for k in ours):
        raise RuntimeError("the export is not the folder that was imported")


def measure() -> list[Measurement]:
    """Both ways."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder, checkpoints, exported = root / "folder", root / "checkpoints", root / "exported"
        write_folder(folder, largest_that_fits(shutil.disk_usage(root).free))
        there = ["tools/convert_from_hf.py", "--model", str(folder), "--output", str(checkpoints)]
        found = in_turns("import", folder, checkpoints, *there)
        back = ["tools/convert_to_hf.py", "--checkpoint", str(checkpoints), "--output", str(exported)]
        checkpoint = checkpoints / "step-00000000"
        found += in_turns("export", checkpoint, exported, *back, "--tokenizer", "none")
        check_equal(exported, folder)
        return found
