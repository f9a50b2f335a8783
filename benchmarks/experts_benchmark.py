"""Optimizer steps of Llamas of 4 layers and width 256, 2 micro batches of 4 samples of 256 tokens, on CPU
processes of one thread. A layer has 16 experts of width 256, a token goes to 2 of them, and to a shared one.
The alternatives: a dense model with as many active parameters; a loop over the experts in place of torch's
grouped product; and, on two data-parallel processes under ZeRO-3, experts that both gather, where megalite
spreads them (`ep_size=2`). Shares of a step are of forward and backward together. Times are the processor's,
which the work of others disturbs less; the learning rate is 0, so routing stays that of the first weights.
"""

import inspect
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.measurement import Measurement, middle_half, seconds_of_rounds
from benchmarks.world import in_world
from megalite.batch import Batch
from megalite.config.data import DataConfig
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.model import ModelConfig
from megalite.config.parallel import ParallelConfig
from megalite.config.run import RunConfig
from megalite.model.moe import routers_of
from megalite.parallel import dispatch, grouped

if TYPE_CHECKING:  # they import deepspeed, which is to know its accelerator before
    from megalite.training.engine import StageEngine
    from megalite.training.trainer import StageTrainer

TITLE = "Training: mixture of experts"
PEER = "alternative"
SEQ_LENGTH, MICRO_BATCH, NUM_MICRO_BATCHES = 256, 4, 2
TOKENS = SEQ_LENGTH * MICRO_BATCH * NUM_MICRO_BATCHES  # of a step, on each process
DENSE = ModelConfig(hidden_size=256, intermediate_size=768)
EXPERTS = ModelConfig(
    hidden_size=256,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=256,
)
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": BF16}
PRODUCTS, DISPATCH, ROUTER, OPTIMIZER = "grouped products", "dispatch", "router", "optimizer"
BOTH = ("forward", "backward")
FUNCTIONS: list[tuple[str, Any, tuple[str, ...]]] = [  # of each part
    (PRODUCTS, grouped._GroupedLinear, BOTH),
    (DISPATCH, dispatch.Dispatch, ("__init__",)),
    (DISPATCH, dispatch._Spread, BOTH),
    (DISPATCH, dispatch._Permute, BOTH),
]
Step = Callable[[], float]


def measure() -> list[Measurement]:
    """On one process, then on two."""
    [alone], [together, _] = in_world(1, on_one_process), in_world(2, on_two_processes)
    return [*alone, *together]


def on_one_process() -> list[Measurement]:
    """Experts against a dense model and against a loop, and where their time goes."""
    clocks = {precision: PartClock() for precision in PRECISIONS}
    steps: dict[str, Step] = {}
    for precision, clock in clocks.items():
        trainer, step = build_step(EXPERTS, precision)
        steps[f"{precision} experts"] = _within(partial(clock.running, trainer.engine), step)
        steps[f"{precision} loop"] = _within(_looping, step)
        _, steps[f"{precision} dense"] = build_step(DENSE, precision)
    seconds = seconds_of_rounds(steps, rounds=9, clock=time.process_time)
    rows = []
    for precision, clock in clocks.items():
        ours, loop, dense = (seconds[f"{precision} {name}"] for name in ("experts", "loop", "dense"))
        rows.append(_compared(f"{precision}, against a dense model", ours, dense))
        rows.append(_compared(f"{precision}, against a loop over experts", ours, loop))
        for part in (PRODUCTS, DISPATCH, ROUTER, OPTIMIZER):
            shares = [100 * parts[part] / whole for parts, whole in zip(clock.rounds, ours, strict=True)]
            share, spread = statistics.median(shares), middle_half(shares)
            rows.append(Measurement(f"{precision}, {part}", "% of a step", share, spread=spread))
    return rows


def on_two_processes() -> list[Measurement]:
    """Experts over ep against experts that each rank gathers, under ZeRO-3."""
    spread, gathered = (build_step(EXPERTS, "fp32", zero_stage=3, ep_size=size)[1] for size in (2, 1))
    losses = [step() for step in (spread, gathered)]
    if not math.isclose(*losses, rel_tol=1e-5):
        raise RuntimeError(f"the losses differ: {losses}")
    ours, theirs = (received_bytes(step) / 2**20 for step in (spread, gathered))
    seconds = seconds_of_rounds({"ours": spread, "theirs": gathered}, rounds=7, clock=time.process_time)
    return [
        _compared("2 processes, against gathered experts", seconds["ours"], seconds["theirs"]),
        Measurement("2 processes, sent to each", "MiB per step", ours, theirs, higher_is_better=False),
    ]


def build_step(
    model: ModelConfig, precision: str, zero_stage: int = 1, ep_size: int = 1
) -> tuple["StageTrainer", Step]:
    """A model in training, and an optimizer step of it, which is warm and returns the loss."""
    from megalite.training.trainer import StageTrainer, build_context

    rank, world_size = dist.get_rank(), dist.get_world_size()
    raw = {
        "train_batch_size": MICRO_BATCH * NUM_MICRO_BATCHES * world_size,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero_stage},
        **PRECISIONS[precision],
    }
    run = RunConfig(
        model=model, data=DataConfig(seq_length=SEQ_LENGTH), parallel=ParallelConfig(ep_size=ep_size)
    )
    context = build_context(run, rank, world_size, torch.device("cpu"))
    trainer = StageTrainer(run, deepspeed_config_from(raw, "the benchmark"), context)
    torch.manual_seed(rank)
    tokens = torch.randint(model.vocab_size, (MICRO_BATCH * NUM_MICRO_BATCHES, SEQ_LENGTH + 1))
    batches = Batch(tokens[:, :-1], tokens[:, 1:].contiguous()).split(NUM_MICRO_BATCHES)

    def step() -> float:
        return trainer.train_step(batches, learning_rate=0.0).loss

    step()
    return trainer, step


class PartClock:
    """CPU seconds that parts of a step take, forward and backward together.

    Attributes:
        rounds: for each step that was taken in `running`, the seconds of each part.
    """

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._started = 0.0

    @contextmanager
    def running(self, engine: "StageEngine") -> Iterator[None]:
        """Time the parts of one step."""
        self.rounds.append(defaultdict(float))
        with ExitStack() as stack:
            for part, owner, names in [*FUNCTIONS, (OPTIMIZER, engine, ("step",))]:
                for name in names:
                    stack.enter_context(patch.object(owner, name, self._timed(part, owner, name)))
            for router in routers_of(engine.module):
                stack.enter_context(router.register_forward_pre_hook(self._start))
                stack.enter_context(router.register_forward_hook(self._stop))
                stack.enter_context(router.register_full_backward_pre_hook(self._start))
                stack.enter_context(router.register_full_backward_hook(self._stop))
            yield

    def _timed(self, part: str, owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            started = time.process_time()
            result = function(*arguments)
            self.rounds[-1][part] += time.process_time() - started
            return result

        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        return staticmethod(timed) if is_static else timed

    def _start(self, *_: Any) -> None:
        self._started = time.process_time()

    def _stop(self, *_: Any) -> None:
        self.rounds[-1][ROUTER] += time.process_time() - self._started


def received_bytes(step: Step) -> float:
    """What others send to this rank in a step of fp32: parameters, parts of gradients, and tokens."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    received = 0.0
    for event in profiler.events():
        if event.name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            received += abs(math.prod(event.input_shapes[0]) - math.prod(event.input_shapes[1]))
        elif event.name == "c10d::alltoall_base_":  # ranks are sent alike by all
            received += math.prod(event.input_shapes[0]) * (1 - 1 / dist.get_world_size())
    return 4 * received


def _looping() -> AbstractContextManager[Any]:
    return patch.object(grouped, "has_kernel", lambda x, weight: False)


def _within(condition: Callable[[], AbstractContextManager[Any]], step: Step) -> Step:
    def body() -> float:
        with condition():
            return step()

    return body


def _compared(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Measurement:
    """Tokens per second from the seconds of rounds in turns."""
    ratios = [theirs_seconds / seconds for seconds, theirs_seconds in zip(ours, theirs, strict=True)]
    our_speed, their_speed = (TOKENS / statistics.median(seconds) for seconds in (ours, theirs))
    return Measurement(name, "tokens per CPU second", our_speed, their_speed, spread=middle_half(ratios))
