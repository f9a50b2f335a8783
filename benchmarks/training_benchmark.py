"""Optimizer steps of the 39M model on two cores: 8 samples of 512 tokens in 2 micro batches (4 in a pipeline,
one where two ranks share the samples). A figure is the share of the rate of torch's matrix product on these
cores, taken beside each step, that is model FLOPs: 6 per matmul parameter and 12 x layers x hidden x sequence
for attention, per token. Peers take turns with it, in processes of their own, each with torch's fused AdamW:
transformers' Llama in a plain loop on 2 threads, in DDP, or in DeepSpeed's engine with the same settings, and
picotron from a checkout (PICOTRON=FOLDER), which has no ZeRO, no clipping and no tied head. Weights of the
plain loop are in bf16 where it says bf16. Two processes, and four, have a thread in each. With ZB-H1 and ZBV
the rank with the head has two layers fewer (`parallel.layers_per_stage`). megalite keeps freed memory, as its
launchers do with so small a model; peers have the C library's own rule. Brackets hold the middle half of five
rounds.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import picotron_peer
from benchmarks.measurement import Measurement, middle_half
from benchmarks.samples import random_samples
from benchmarks.turns import in_turns
from megalite.batch import Batch
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.model.flops import flops_per_token

TITLE = "Training: the 39M model"
PEER = "peer"
CONFIG = Path(__file__).parent.parent / "configs" / "runs" / "lillm_39m.yaml"
SAMPLES, CLIP, ROUNDS, UNTIMED = 8, 1.0, 5, 2
CORES = 2
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
PRODUCT = {"fp32": 768, "bf16": 1536}  # rows of the square matrices that the rate of products is taken with


@dataclass(frozen=True)
class Row:
    """A layout, and who it is compared with: "plain", "ddp", "deepspeed", "picotron"; None for nobody."""

    name: str
    world_size: int
    precision: str = "fp32"
    zero: int = 1
    num_micro_batches: int = 2
    parallel: str = ""
    peer: str | None = None

    def size(self, axis: str) -> int:
        """Ranks along "tp" or "pp"."""
        given = dict(word.split("=") for word in self.parallel.split())
        return int(given.get(f"parallel.{axis}_size", 1))

    @property
    def dp_size(self) -> int:
        """Ranks with other samples."""
        return self.world_size // self.size("tp") // self.size("pp")

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
SCHEDULE = "parallel.pipeline_schedule="
# Head and loss weigh more than a layer: the rank that has them has fewer.
H = f"{PP2} {SCHEDULE}zb-h1 parallel.layers_per_stage=[7,5]"
V = f"{PP2} {SCHEDULE}zbv parallel.layers_per_stage=[3,4,3,2]"
PIPELINE = partial(Row, zero=3, num_micro_batches=4, peer="picotron")
ROWS = (
    Row("one process, fp32, against transformers", 1, zero=0, peer="plain"),
    Row("one process, bf16, against transformers", 1, "bf16", peer="plain"),
    Row("dp 2, ZeRO-1, fp32, against DDP", 2, num_micro_batches=1, peer="ddp"),
    Row("dp 2, ZeRO-1, fp32, against DeepSpeed", 2, num_micro_batches=1, peer="deepspeed"),
    Row("dp 2, ZeRO-3, fp32, against DeepSpeed", 2, zero=3, num_micro_batches=1, peer="deepspeed"),
    Row("dp 2, ZeRO-3, bf16, against DeepSpeed", 2, "bf16", 3, 1, peer="deepspeed"),
    Row("tp 2, ZeRO-1, fp32, against picotron", 2, parallel=TP2, peer="picotron"),
    Row("tp 2, ZeRO-3, fp32, against picotron", 2, zero=3, parallel=TP2, peer="picotron"),
    PIPELINE("pp 2, 1f1b, ZeRO-3, fp32, against picotron", 2, parallel=PP2),
    PIPELINE("pp 2, zb-h1, ZeRO-3, fp32, against picotron", 2, parallel=H),
    PIPELINE("pp 2, zbv, ZeRO-3, fp32, against picotron", 2, parallel=V),
    PIPELINE("tp 2 x pp 2, 1f1b, ZeRO-3, fp32, against picotron", 4, parallel=f"{TP2} {PP2}"),
    PIPELINE("tp 2 x pp 2, zbv, ZeRO-3, fp32, against picotron", 4, parallel=f"{TP2} {V}"),
)


def measure() -> list[Measurement]:
    """Each row in processes of its own; without those in bf16 on a CPU that has no instructions for it."""
    has_picotron = picotron_peer.checkout() is not None
    rows = [row if has_picotron or row.peer != "picotron" else replace(row, peer=None) for row in ROWS]
    rates = {precision: _product_rate(precision) for precision in PRODUCT}
    if rates["bf16"] < rates["fp32"] / 2:
        print(f"left out: bf16, at {rates['bf16'] / 1e9:.1f} GFLOP/s here", file=sys.stderr)
        rows = [row for row in rows if row.precision != "bf16"]
    return [measured(row) for row in rows]


def measured(row: Row) -> Measurement:
    """Shares of the ceiling, and where there is a peer the advantage over it, round by round."""
    bodies = {"ours": partial(made, row, None)} | (
        {"theirs": partial(made, row, row.peer)} if row.peer else {}
    )
    turns = in_turns(row.world_size, bodies, ROUNDS)
    # A step ends on all ranks together, but for the last instructions of each.
    seconds = {name: [max(turn)[0] for turn in zip(*ranks, strict=True)] for name, ranks in turns.items()}
    rates = [[rate for ranks in turns.values() for _, rate in ranks[rank]] for rank in range(row.world_size)]
    ceiling = sum(map(statistics.median, rates))
    flops = flops_per_token(run_of(row).model, run_of(row).data.seq_length)
    work = SAMPLES * run_of(row).data.seq_length * flops
    print(f"{row.name}: ceiling {ceiling / 1e9:.1f} GFLOP/s, seconds {seconds}", file=sys.stderr, flush=True)
    share = {name: work / statistics.median(steps) / ceiling for name, steps in seconds.items()}
    if row.peer is None:
        spread = middle_half([work / step / ceiling for step in seconds["ours"]])
    else:
        spread = middle_half([peer / own for own, peer in zip(*seconds.values(), strict=True)])
    return Measurement(row.name, "of the ceiling", share["ours"], share.get("theirs"), spread=spread)


def run_of(row: Row) -> RunConfig:
    """The run that a row trains."""
    overrides = ["data.train=null", "logging.validate_every_steps=0", *row.parallel.split()]
    return load_run(str(CONFIG), overrides)


def made(row: Row, peer: str | None) -> Callable[[], tuple[float, float]]:
    """A step of ours or of a peer, as what gives its seconds, and FLOP/s of products beside it, here."""
    torch.set_num_threads(max(1, CORES // row.world_size))
    run = run_of(row)
    step = our_step(row, run) if peer is None else peer_step(row, run)
    for _ in range(UNTIMED):  # moments are born, and ZeRO-3 learns in what order weights are used
        step()
    return lambda: (_seconds_of(step), _product_rate(row.precision))


def our_step(row: Row, run: RunConfig) -> Callable[[], float]:
    """An optimizer step of megalite on this rank's samples."""
    from megalite.training.memory import settle_memory
    from megalite.training.trainer import StageTrainer, build_context

    context = build_context(run, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    deepspeed = deepspeed_config_from(row.deepspeed, "the benchmark")
    settle_memory(run, deepspeed, context, row.world_size)  # as the launcher does
    trainer = StageTrainer(run, deepspeed, context)
    batches = _batches(run, row, context["dp"].rank)
    return lambda: trainer.train_step(batches, run.optimizer.learning_rate).loss


def peer_step(row: Row, run: RunConfig) -> Callable[[], float]:
    """The same by the row's peer."""
    from deepspeed.runtime.comm import coalesced_collectives

    from benchmarks import peers
    from megalite.training.engine import SHIPPED_REDUCE_SCATTER

    batches = _batches(run, row, dist.get_rank() % row.dp_size)
    if row.peer == "picotron":
        return picotron_peer.picotron_step(run, batches, row.size("tp"), row.size("pp"))
    if row.peer == "deepspeed":
        coalesced_collectives._torch_reduce_scatter_fn = SHIPPED_REDUCE_SCATTER  # not ours
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
    """FLOP/s of this rank's threads, while all ranks, if there are others, multiply."""
    size = PRODUCT[precision]
    left, right = (torch.randn(size, size).to(torch.bfloat16 if precision == "bf16" else torch.float32),) * 2
    torch.mm(left, right)
    if dist.is_initialized():
        dist.barrier()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        torch.mm(left, right)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - started)
