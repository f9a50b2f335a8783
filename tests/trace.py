"""Where a layout first departs from one process: every module's output, and the gradient of that output.

    departure = first_departure(trace_of(case), reference_trace(case))
    str(departure)      # model.layers.1.input_layernorm backward, by 4.1e-01 relative

A traced step is the first of test_equivalence.py. Modules have Hugging Face's names; what enters a row layer
is traced as "model.layers.1.self_attn into o_proj", since attention's output is already that of o_proj; what
the head gives are loss sums, one per micro batch.
Gradients of weights are not traced: where none departs, look there, at the norm and at the optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megalite.model.llama import LlamaStage
from megalite.model.moe import RoutedExperts, TopKRouter
from megalite.parallel.context import ParallelContext, Ranks
from megalite.parallel.head import VocabParallelHead
from megalite.parallel.linear import ColumnParallelLinear, MergedColumnLinear, RowParallelLinear
from megalite.parallel.sequence import SequenceCut
from megalite.parallel.shard import spec_of
from megalite.parallel.topology import DATA_AXES
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import BATCH, MICRO_BATCH, SEED, Case, build_trainer, global_batch, micro_batches

TOLERANCE = (
    1e-5  # relative to a tensor's largest element: a hundred fp32 roundings, as in test_equivalence.py
)
FORWARD, BACKWARD = "forward", "backward"
Key = tuple[str, str]  # (module, direction)
# Of each key the whole tensor [s, all samples, features], as often as ranks hold copies; in forward order.
Trace = dict[Key, list[torch.Tensor]]
Fault = Callable[[LlamaStage, ParallelContext], Any]  # plants an error in a stage


@dataclass(frozen=True)
class Departure:
    """The first module that gives something else."""

    module: str
    direction: str
    difference: float  # largest, relative to the largest element

    def __str__(self) -> str:
        return f"{self.module} {self.direction}, by {self.difference:.1e} relative"


def first_departure(trace: Trace, reference: Trace, tolerance: float = TOLERANCE) -> Departure | None:
    """The first in forward order that departs in forward, else the first from the loss back, else None."""
    assert trace.keys() == reference.keys()
    order = [key for key in reference if key[1] == FORWARD]
    order += reversed([key for key in reference if key[1] == BACKWARD])
    for key in order:
        (want,) = reference[key]
        difference = max(_relative(got, want) for got in trace[key])
        if not difference < tolerance:
            return Departure(*key, difference)
    return None


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).nan_to_num(torch.inf).item()


def describe_departure(case: Case) -> str:
    """Runs the first step of a case again, for the message of a test that failed."""
    departure = first_departure(trace_of(case), reference_trace(case))
    if departure is None:
        return "in the first step no activation or its gradient departs: a weight's gradient or the optimizer"
    return f"in the first step departs first: {departure}"


def trace_of(case: Case, fault: Fault | None = None) -> Trace:
    """The first step of a layout, put together from all ranks."""
    return traces_of_world(case.world_size, [(case, fault)])[0]


def traces_of_world(world_size: int, runs: list[tuple[Case, Fault | None]]) -> list[Trace]:
    """The same of several layouts that need as many ranks, which are started once."""
    return run_distributed(_trace_rank, world_size, runs, timeout_seconds=600)[0]


def reference_trace(case: Case, seed: int = SEED) -> Trace:
    """The same of a whole model in this process, without DeepSpeed or a pipeline."""
    stage = LlamaStage(case.model, seed=seed)
    tracer = Tracer(stage, sequence_parallel=False)
    batch = global_batch(0, documents=case.documents, uneven=case.uneven)
    for micro_batch in batch.split(BATCH // MICRO_BATCH):
        (stage(None, micro_batch) / batch.loss_count()).backward()
    return put_together([(ParallelContext(), tracer.local())])


def _trace_rank(rank: int, runs: list[tuple[Case, Fault | None]]) -> list[Trace | None]:
    initialize_communication()
    return [_traced_step(rank, case, fault) for case, fault in runs]


def _traced_step(rank: int, case: Case, fault: Fault | None) -> Trace | None:
    trainer = build_trainer(rank, case)
    context, stage = trainer.context, trainer.engine.module[0]
    if fault is not None:
        fault(stage, context)
    tracer = Tracer(stage, sequence_parallel=case.sp and case.tp > 1)
    trainer.train_step(micro_batches(0, context, case), learning_rate=1e-3)
    local = tracer.local(gradient_scale=1 / context[DATA_AXES].size)  # ZeRO averages, one process sums
    everyone: list[Any] | None = [None] * case.world_size if rank == 0 else None
    place = ParallelContext(context.topology, rank)  # without the groups, which stay where they were made
    dist.gather_object((place, local), everyone)
    return None if everyone is None else put_together(everyone)


@dataclass(frozen=True)
class Part:
    """What a rank holds of a traced tensor: all its samples [., samples, .], and how it lies over tp.

    lies: "whole" on every rank; cut along the "sequence"; or its last dimension cut over "tp" or "kv".
    """

    lies: str
    tensor: torch.Tensor


class Tracer:
    """Listens to the modules of a stage, from its birth on, in training."""

    def __init__(self, stage: LlamaStage, *, sequence_parallel: bool) -> None:
        self._residual = "sequence" if sequence_parallel else "whole"
        self._seen: dict[Key, dict[int, torch.Tensor]] = {}
        self._lies: dict[str, str] = {}
        self._micro_batch = -1
        stage.register_forward_pre_hook(self._next_micro_batch)
        for path, module in stage.named_modules():
            # What routed experts give is a part of a sum over tp: it is heard of as their layer's.
            if path and not isinstance(module, nn.ModuleDict | TopKRouter | RoutedExperts):
                self._listen(path if path == "lm_head" else f"model.{path}", module)

    def local(self, gradient_scale: float = 1.0) -> dict[Key, Part]:
        """What was heard, in forward order; the micro batches of each side by side."""
        parts = {}
        for name, lies in self._lies.items():
            for direction, scale in ((FORWARD, 1.0), (BACKWARD, gradient_scale)):
                heard = self._seen[name, direction]
                tensor = torch.cat([heard[i] for i in range(self._micro_batch + 1)], dim=1)
                parts[name, direction] = Part(lies, tensor * scale)
        return parts

    def _next_micro_batch(self, *_: Any) -> None:
        self._micro_batch += 1

    def _listen(self, name: str, module: nn.Module) -> None:
        if isinstance(module, MergedColumnLinear):
            weights = [spec_of(getattr(module, f"{column.name}_weight")) for column in module.columns]
            places = [(spec.name.removesuffix(".weight"), spec.cuts[0].over) for spec in weights]
        elif isinstance(module, VocabParallelHead):  # what it gives are losses, no logits
            places = [(name, "whole")]
        elif isinstance(module, ColumnParallelLinear):
            places = [(name, "tp")]
        elif name.endswith(("q_norm", "k_norm")):  # of heads
            places = [(name, "tp" if name.endswith("q_norm") else "kv")]
        else:
            places = [(name, self._residual)]

        def heard(_: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for place, tensor in zip(places, outputs, strict=True):
                self._hear(*place, tensor)

        def entering(_: nn.Module, args: Any) -> None:
            self._hear(" into ".join(name.rsplit(".", 1)), "tp", args[0])

        if isinstance(module, RowParallelLinear):
            module.register_forward_pre_hook(entering)
        module.register_forward_hook(heard)

    def _hear(self, name: str, lies: str, tensor: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # backward computes it again
        self._lies[name] = lies
        self._keep(name, FORWARD, self._micro_batch, tensor)
        micro_batch = self._micro_batch
        tensor.register_hook(lambda grad: self._keep(name, BACKWARD, micro_batch, grad))

    def _keep(self, name: str, direction: str, micro_batch: int, tensor: torch.Tensor) -> None:
        tensor = tensor.view(1, 1, 1) if tensor.ndim == 0 else tensor.flatten(2)  # a loss sum, or activations
        self._seen.setdefault((name, direction), {})[micro_batch] = tensor.detach().clone()


def put_together(held_by: list[tuple[ParallelContext, dict[Key, Part]]]) -> Trace:
    """The whole tensors of all stages, from what each rank holds."""
    trace: Trace = {}
    ordered = sorted(held_by, key=lambda held: held[0].rank)  # stages, samples, their parts, slices of layers
    tp, copies = (ordered[0][0][axis].size for axis in ("tp", "kv_copy"))
    cp = ordered[0][0]["cp"]
    for key in dict.fromkeys(key for _, local in ordered for key in local):
        held = [local[key] for _, local in ordered if key in local]
        parts = [_over_tp(held[i : i + tp], copies, key[1]) for i in range(0, len(held), tp)]
        over_cp = partial(_sums_over_cp, key[1]) if key[0] == "lm_head" else _over_cp
        samples = [over_cp(parts[i : i + cp.size], cp) for i in range(0, len(parts), cp.size)]
        trace[key] = [torch.cat(tensors, dim=1) for tensors in zip(*samples, strict=True)]
    return trace


def _sums_over_cp(direction: str, parts: list[list[torch.Tensor]], _: Ranks) -> list[torch.Tensor]:
    """Loss sums: of a part of the sequence each, whose gradient is that of the whole sum."""
    by_copy = zip(*parts, strict=True)
    return [torch.stack(sums).sum(0) for sums in by_copy] if direction == FORWARD else parts[0]


def _over_cp(parts: list[list[torch.Tensor]], ranks: Ranks) -> list[torch.Tensor]:
    """Whole sequences, of as many copies as there are of each part."""
    whole = [torch.cat(copies, dim=0) for copies in zip(*parts, strict=True)]
    return [SequenceCut(len(tensor), ranks).in_order(tensor, dim=0) for tensor in whole]


def _over_tp(parts: list[Part], copies: int, direction: str) -> list[torch.Tensor]:
    """One whole tensor, or each of its copies."""
    lies, tensors = parts[0].lies, [part.tensor for part in parts]
    if lies == "whole":
        return tensors
    if lies == "sequence":
        return [torch.cat(tensors, dim=0)]
    if lies == "tp":
        return [torch.cat(tensors, dim=-1)]
    heads = [torch.cat(tensors[i::copies], dim=-1) for i in range(copies)]
    # Each copy has the gradient of the query heads next to it.
    return heads if direction == FORWARD else [torch.stack(heads).sum(dim=0)]
