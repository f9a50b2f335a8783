"""Optimizer steps of the 39M model on two cores: 8 samples of 512 tokens in 2 micro batches (4 in a pipeline,
one where two ranks share the samples). A figure is the share of the cores' matrix-product rate, taken beside
each step, that is model FLOPs: 6 per matmul parameter and 12 x layers x hidden x sequence for attention, per
token. Peers take turns with it: transformers' Llama in a plain loop on 2 threads, in DDP, or in DeepSpeed's
engine with the same settings, each with torch's fused AdamW; weights of the plain loop are in bf16 where it
says bf16. Two processes, and four, have a thread in each.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measurement import Measurement
from benchmarks.samples import random_samples
from benchmarks.world import in_world
from megalite.batch import Batch
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.model.flops import flops_per_token

TITLE = "Training: the 39M model"
PEER = "peer"
CONFIG = Path(__file__).parent.parent / "configs" / "runs" / "lillm_39m.yaml"
SAMPLES, CLIP, ROUNDS = 8, 1.0, 9
CORES = 2
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
PRODUCT = {"fp32": 768, "bf16": 1536}  # rows of the square matrices that the rate of products is taken with


@dataclass(frozen=True)
class Row:
    """A layout, and who it is compared with: "plain", "ddp", "deepspeed", or nobody."""

    name: str
    world_size: int
    precision: str = "fp32"
    zero: int = 1
    num_micro_batches: int = 2
    parallel: str = ""
    peer: str | None = None

    @property
    def dp_size(self) -> int:
        """Ranks with other samples."""
        sizes = dict(word.split("=") for word in self.parallel.split() if "_size" in word)
        model = int(sizes.get("parallel.tp_size", 1)) * int(sizes.get("parallel.pp_size", 1))
        return self.world_size // model

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The settings of the engine."""
        return {
            "train_batch_size": SAMPLES,
            "train_micro_batch_size_per_gpu": SAMPLES // self.num_micro_batches // self.dp_size,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": self.zero},
            **(BF16 if self.precision == "bf16" else {}),
        }


TP2, PP2 = "parallel.tp_size=2", "parallel.pp_size=2"
ROWS = (
    Row("one process, fp32, against transformers", 1, peer="plain"),
    Row("one process, bf16, against transformers", 1, "bf16", peer="plain"),
    Row("dp 2, ZeRO-1, fp32, against DDP", 2, num_micro_batches=1, peer="ddp"),
    Row("dp 2, ZeRO-1, fp32, against DeepSpeed", 2, num_micro_batches=1, peer="deepspeed"),
    Row("dp 2, ZeRO-3, fp32, against DeepSpeed", 2, zero=3, num_micro_batches=1, peer="deepspeed"),
    Row("dp 2, ZeRO-3, bf16, against DeepSpeed", 2, "bf16", 3, 1, peer="deepspeed"),
    Row("tp 2, ZeRO-1, fp32", 2, parallel=TP2),
    Row("tp 2, ZeRO-3, fp32", 2, zero=3, parallel=TP2),
    Row("pp 2, 4 micro batches, ZeRO-3, fp32", 2, zero=3, num_micro_batches=4, parallel=PP2),
    Row("tp 2 x pp 2, ZeRO-3, fp32", 4, zero=3, num_micro_batches=4, parallel=f"{TP2} {PP2}"),
)


def measure() -> list[Measurement]:
    """Each row in processes of its own."""
    return [measurement for row in ROWS for measurement in measured(row)]


def measured(row: Row) -> list[Measurement]:
    """Shares of the ceiling, and where there is a peer the advantage over it, round by round."""
    rounds = in_world(row.world_size, partial(rounds_of, row))
    ceiling = sum(statistics.median(rank["ceiling"]) for rank in rounds)
    flops = flops_per_token(run_of(row).model, run_of(row).data.seq_length)
    work = SAMPLES * run_of(row).data.seq_length * flops
    # A step ends on all ranks together, but for the last instructions of each.
    ours = [max(seconds) for seconds in zip(*(rank["ours"] for rank in rounds), strict=True)]
    share = work / statistics.median(ours) / ceiling
    if row.peer is None:
        return [Measurement(row.name, "of the ceiling", share)]
    theirs = [max(seconds) for seconds in zip(*(rank["theirs"] for rank in rounds), strict=True)]
    advantages = [other / own for own, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(advantages, n=4)
    peer = work / statistics.median(theirs) / ceiling
    return [Measurement(row.name, "of the ceiling", share, peer, spread=(low, high))]


def run_of(row: Row) -> RunConfig:
    """The run that a row trains."""
    overrides = ["data.train=null", "logging.validate_every_steps=0", *row.parallel.split()]
    return load_run(str(CONFIG), overrides)


def rounds_of(row: Row) -> dict[str, list[float]]:
    """Of this rank: seconds of our steps and of the peer's, in turns, and FLOP/s of products beside them."""
    torch.set_num_threads(max(1, CORES // row.world_size))
    run = run_of(row)
    bodies: dict[str, Callable[[], float]] = {"ours": our_step(row, run)}
    if row.peer is not None:
        bodies["theirs"] = peer_step(row, run)
    for body in bodies.values():
        body(), body()
    rounds: dict[str, list[float]] = {name: [] for name in [*bodies, "ceiling"]}
    for _ in range(ROUNDS):
        for name, body in bodies.items():
            rounds[name].append(_seconds_of(body))
            rounds["ceiling"].append(_product_rate(row.precision))
    return rounds


def our_step(row: Row, run: RunConfig) -> Callable[[], float]:
    """An optimizer step of megalite on this rank's samples."""
    from megalite.training.trainer import StageTrainer, build_context

    context = build_context(run, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    trainer = StageTrainer(run, deepspeed_config_from(row.deepspeed, "the benchmark"), context)
    batches = _batches(run, row, context["dp"].rank)
    return lambda: trainer.train_step(batches, run.optimizer.learning_rate).loss


def peer_step(row: Row, run: RunConfig) -> Callable[[], float]:
    """The same by the row's peer."""
    from benchmarks import peers

    batches = _batches(run, row, dist.get_rank() % row.dp_size)
    if row.peer == "deepspeed":
        return peers.deepspeed_step(run, row.deepspeed, batches)
    return peers.plain_step(run, row.precision, batches, CLIP, replicated=row.peer == "ddp")


def _batches(run: RunConfig, row: Row, dp_rank: int) -> Sequence[Batch]:
    samples = random_samples(SAMPLES, run.model.vocab_size, run.data.seq_length, torch.device("cpu"))
    return samples.split(row.dp_size)[dp_rank].split(row.num_micro_batches)


def _seconds_of(body: Callable[[], Any]) -> float:
    """Of a call that all ranks begin together."""
    dist.barrier()
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def _product_rate(precision: str) -> float:
    """FLOP/s of this rank's threads, while all ranks multiply."""
    size = PRODUCT[precision]
    left, right = (torch.randn(size, size).to(torch.bfloat16 if precision == "bf16" else torch.float32),) * 2
    torch.mm(left, right)
    dist.barrier()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        torch.mm(left, right)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - started)
