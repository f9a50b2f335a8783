"""Training on one GPU: tokens per second, utilisation and memory, beside transformers + DeepSpeed.

    python -m benchmarks.gpu             # all parts, as `make bench-gpu`; needs no network
    python -m benchmarks.gpu 460m_1024   # one part, of at most 8 minutes; other sections of the page stay

Each figure is of a process of its own, since memory is compared; ZeRO-3 in bf16, master weights and gradient
sums in fp32. Writes docs/benchmarks.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.measurement import Measurement, in_fresh_process
from benchmarks.run import PAGE, publish, table
from benchmarks.samples import random_samples
from megalite.batch import Batch
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.measure.hardware import peak_flops_per_second
from megalite.model.flops import FLOPS_FORMULA, flops_per_token

PEER = "transformers + DeepSpeed"
RUNS = Path(__file__).parent.parent / "configs" / "runs"
NUM_MICRO_BATCHES, WARM_STEPS, STEPS = 4, 3, 10
OURS = {"gathered per step": "step", "gathered per micro batch": "micro_batch"}
PEERS = {"": False, ", compiled": True}


class Figures(NamedTuple):
    """Of one process."""

    tokens_per_second: float
    utilisation: float
    peak_bytes: int


@dataclass(frozen=True)
class Part:
    """A model at a sequence length; micro batches are of as many samples as 80 GB hold with room to spare."""

    config: str
    seq_length: int
    micro_batch: int

    def run(self, gathering: str) -> RunConfig:
        """The run, whose data is made here."""
        facts = {
            "model.max_position_embeddings": self.seq_length,
            "data.seq_length": self.seq_length,
            "data.train": "null",
            "parallel.parameter_gathering": gathering,
            "logging.validate_every_steps": 0,
        }
        return load_run(str(RUNS / f"{self.config}.yaml"), [f"{key}={value}" for key, value in facts.items()])

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The engine's settings, ours and the peer's."""
        return {
            "train_batch_size": self.micro_batch * NUM_MICRO_BATCHES,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }


PARTS = {
    "460m_1024": Part("pretrain_460m", 1024, 16),
    "460m_4096": Part("pretrain_460m", 4096, 4),
    "1.1b_1024": Part("tinyllama_1.1b", 1024, 8),
    "1.1b_4096": Part("tinyllama_1.1b", 4096, 2),
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write (default: docs/benchmarks.md)")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        print(f"error: no part {unknown[0]!r}: known are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: torch sees no GPU, which these need: make bench is for a CPU", file=sys.stderr)
        return 2
    for name in arguments.parts or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        measurements = measured(PARTS[name], torch.device("cuda", 0))
        print(f"\n{name}\n\n{table(measurements, PEER)}\n", flush=True)
        publish(arguments.page, f"gpu {name}", _section(name), measurements)
    return 0


def measured(part: Part, device: torch.device) -> list[Measurement]:
    """Both ways to gather, each against the peer with and without torch.compile."""
    ours = {name: in_fresh_process(_figures, part, "ours", how, device) for name, how in OURS.items()}
    theirs = {name: in_fresh_process(_figures, part, "peer", how, device) for name, how in PEERS.items()}
    rows = []
    for our_name, our in ours.items():
        for their_name, their in theirs.items():
            name = our_name + their_name
            rows.append(Measurement(name, "tokens/s", our.tokens_per_second, their.tokens_per_second))
            rows.append(Measurement(name, "MFU", our.utilisation, their.utilisation))
            memory = (our.peak_bytes / 2**20, their.peak_bytes / 2**20)
            rows.append(Measurement(f"{name}, memory", "MiB", *memory, higher_is_better=False))
    return rows


def _figures(part: Part, whose: str, how: Any, device: torch.device) -> Figures:
    """In this process: the median of the steps, and the most memory that torch had in use."""
    is_gpu = device.type == "cuda"
    store = dist.HashStore()
    dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=0, world_size=1)
    run = part.run(how if whose == "ours" else "step")
    step = (_our_step if whose == "ours" else partial(_their_step, compiled=how))(part, run, device)
    for _ in range(WARM_STEPS):
        step()
    seconds = statistics.median(_seconds_of(step, device) for _ in range(STEPS))
    tokens = part.micro_batch * NUM_MICRO_BATCHES * part.seq_length
    flops = flops_per_token(run.model, part.seq_length) * tokens / seconds
    peak = peak_flops_per_second(device, torch.bfloat16).flops_per_second
    return Figures(tokens / seconds, flops / peak, torch.cuda.max_memory_allocated() if is_gpu else 0)


def _our_step(part: Part, run: RunConfig, device: torch.device) -> Callable[[], float]:
    from megalite.training.engine import initialize_communication
    from megalite.training.trainer import StageTrainer, build_context

    initialize_communication()
    context = build_context(run, 0, 1, device)
    trainer = StageTrainer(run, deepspeed_config_from(part.deepspeed, "the benchmark"), context)
    batches = _batches(part, run, device)
    return lambda: trainer.train_step(batches, run.optimizer.learning_rate).loss


def _their_step(part: Part, run: RunConfig, device: torch.device, *, compiled: bool) -> Callable[[], float]:
    from benchmarks import peers
    from megalite.training.engine import initialize_communication

    initialize_communication()
    return peers.deepspeed_step(run, part.deepspeed, _batches(part, run, device), compiled=compiled)


def _batches(part: Part, run: RunConfig, device: torch.device) -> list[Batch]:
    num_samples = part.micro_batch * NUM_MICRO_BATCHES
    samples = random_samples(num_samples, run.model.vocab_size, part.seq_length, device)
    return samples.split(NUM_MICRO_BATCHES)


def _seconds_of(step: Callable[[], float], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _section(name: str) -> Any:
    """What the page says of a part, as of a benchmark's module."""
    part, module = PARTS[name], ModuleType(name)
    module.__doc__ = (
        f"configs/runs/{part.config}.yaml with samples of {part.seq_length:,} tokens on one "
        f"{torch.cuda.get_device_name(0)}: {NUM_MICRO_BATCHES} micro batches of {part.micro_batch} a step, "
        f"ZeRO-3, bf16. MFU counts {FLOPS_FORMULA}; the peak is "
        f"{peak_flops_per_second(torch.device('cuda', 0), torch.bfloat16).source}."
    )
    module.TITLE, module.PEER = f"GPU: {name.replace('_', ', sequence ')}", PEER  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    sys.exit(main())
