"""One plain DeepSpeed engine around one pipeline stage; the only importer of deepspeed.

DeepSpeed's own PipelineEngine stops at ZeRO-1. One plain engine per stage, driven by our schedule,
goes to ZeRO-3, if a few of the engine's habits are minded; each is explained where it is.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import isfinite
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import numa
from torch import nn

from megalite.batch import Batch
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.error import UserError
from megalite.optimizer.recipe import Recipe, set_learning_rate
from megalite.optimizer.slices import MasterSlice
from megalite.parallel.context import Group, ParallelContext, group_size
from megalite.parallel.deferred import Deferred, DeferredGradients, scalar_of
from megalite.parallel.mpu import ModelParallelUnit
from megalite.parallel.shard import spec_of
from megalite.parallel.topology import DATA_AXES, MODEL_AXES
from megalite.training.eager_hooks import leave_compiler_out
from megalite.training.first_gradients import begin_with_the_first, clear_unreached
from megalite.training.last_uses import LastUses
from megalite.training.masters import share_masters, update_from_partitions
from megalite.training.precision import TORCH_DTYPES
from megalite.training.reduction import by_pieces
from megalite.training.unread import leave_unread_weights
from megalite.training.zero import (
    clear_gradients,
    inner_optimizer,
    is_stage3,
    master_slices,
    reduced_gradients,
    square_of_gradients,
    with_shapes,
)

EXPERTS = "experts"  # our name in DeepSpeed's tables of groups
Refuses = Callable[[float], bool]
NO_SIZES: Mapping[str, int] = {}
NEVER_RELEASED = int(1e15)  # elements: a reuse distance that no model reaches
CORES_COUNTED_ONCE = cache(numa.get_numa_cores)
SHIPPED_REDUCE_SCATTER = coalesced_collectives._torch_reduce_scatter_fn
TESTED_VERSION = (0, 19, 8)  # its inside is patched here and read in zero.py: others of 0.19 may follow


class EngineError(UserError):
    """DeepSpeed cannot do what the run asks for."""


def initialize_communication() -> None:
    """Tell DeepSpeed of the process group that exists, without its optional shared-memory operator.

    DeepSpeed would compile that operator for a minute at first use, and wait for ever where an
    interrupted compile has left its lock. Training needs none of it.

    Raises EngineError for a version of DeepSpeed that was not tested.
    """
    check_version(deepspeed.__version__)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed uses
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # It decorates its Muon, which no recipe uses, with torch.compile: every start would import the compiler.
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    # It counts a CPU's nodes of memory at every sum of gradients under ZeRO-3, by a process that it starts.
    numa.get_numa_cores = CORES_COUNTED_ONCE
    coalesced_collectives._torch_reduce_scatter_fn = by_pieces(SHIPPED_REDUCE_SCATTER)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


def check_version(version: str) -> None:
    """Raise EngineError for a DeepSpeed whose inside has not been read: it may be silently wrong."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not TESTED_VERSION <= numbers < (*TESTED_VERSION[:1], TESTED_VERSION[1] + 1):
        tested = ".".join(map(str, TESTED_VERSION))
        raise EngineError(
            f"DeepSpeed {version} is installed and megalite was tested with {tested}: "
            f"pip install 'deepspeed~={tested}'"
        )


class StageChunks(nn.ModuleList):
    """The chunks of the model that one rank holds, as one module: one engine, one step, one norm."""

    def forward(self, x: torch.Tensor | None, *, batch: Batch, chunk: int) -> torch.Tensor:
        """One micro batch through one chunk."""
        return self[chunk](x, batch=batch)


class StageEngine:
    """Forward, backward and optimizer step of one stage, for ZeRO 0, 1, 2 and 3.

    Args:
        build_chunks: makes the stage's chunks; under ZeRO-3 each layer is partitioned as it is made.
        recipe: the optimizer; the learning rate comes with each step.
        config: the DeepSpeed configuration.
        context: process groups.
        num_micro_batches: in one optimizer step.
        parameter_gathering: under ZeRO-3, gather a stage's parameters once per "step", or once per
            "micro_batch" and direction, those that backward does not read in forward alone.
        bucket_sizes: keys of `zero_optimization` that the run sets, in elements, see plan/buckets.py.
        deferred: where the chunks' layers leave gradients of weights, if they do.
    """

    def __init__(
        self,
        build_chunks: Callable[[], Sequence[nn.Module]],
        recipe: Recipe,
        config: DeepSpeedConfig,
        context: ParallelContext,
        *,
        num_micro_batches: int,
        parameter_gathering: str = "step",
        bucket_sizes: Mapping[str, int] = NO_SIZES,
        deferred: DeferredGradients | None = None,
    ) -> None:
        self.config, self.context, self.recipe = config, context, recipe
        self.deferred = deferred
        self.dtype = TORCH_DTYPES[config.precision]
        settings = deepspeed_settings(
            config, num_micro_batches, parameter_gathering, context[DATA_AXES].size, bucket_sizes
        )
        mpu = ModelParallelUnit(context)
        assert context["ep"].size == 1 or config.zero_stage == 3, "experts over ranks need ZeRO-3"
        with _Partitioning(
            context,
            enabled=config.zero_stage == 3,
            config_dict_or_path=settings,
            mpu=mpu,
            # No dtype: on a CPU, which has no fp16, Init takes any dtype given for bf16.
            mem_efficient_linear=False,  # our layers keep no transposed views: see parallel/linear.py
        ):
            module = StageChunks(build_chunks())
        state = {name: b for name, b in module.named_buffers() if hasattr(b, "spec")}
        groups = recipe.groups(list(module.parameters()))
        _require_equal_groups(len(groups), context)
        leave_compiler_out(parameter_offload, partitioned_param_coordinator.PartitionedParameterCoordinator)
        inner = recipe.build(groups)
        if type(inner) not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(type(inner))  # else it warns: ours are tested in every layout
        self.engine, *_ = deepspeed.initialize(
            model=module.to(context.device) if config.zero_stage < 3 else module,
            optimizer=inner,
            config=settings,
            mpu=mpu,
            dist_init_required=False,
        )
        _restore_buffers(self.engine.module, state, context.device)
        self.optimizer = self.engine.optimizer
        share_masters(self.optimizer)
        masters = {part.parameter: part for part in self.masters()}
        recipe.settle(inner_optimizer(self.optimizer), masters, context)
        self._own_norm: torch.Tensor | None = None
        self._refuses: Refuses | None = None
        self._takes_step: bool | None = None  # of the step under way, once it is known
        self._backwards_to_come: dict[int, dict[nn.Module, int]] = {}
        self.gathers_once = config.zero_stage == 3 and parameter_gathering == "step"
        self.tied = [p for p in module.parameters() if spec_of(p).is_tied and p.requires_grad]
        if config.zero_stage == 3:
            update_from_partitions(self.optimizer)
            self._own_the_trace()
        self._own_the_reductions()
        self._put_a_gate_before_the_update()

    @property
    def module(self) -> StageChunks:
        """The chunks of the stage."""
        return self.engine.module

    def masters(self) -> Iterator[MasterSlice]:
        """Where this rank's masters lie of the parameters that are trained."""
        for parameter in self.module.parameters():
            data_rank = self.context[spec_of(parameter).averaged_over].rank
            yield from master_slices(self.optimizer, [parameter], data_rank)

    @property
    def loss_scale(self) -> float:
        """fp16's loss scale, which DeepSpeed multiplies in at every backward; 1 elsewhere."""
        return self.optimizer.loss_scale if self.config.precision == "fp16" else 1.0

    def _own_the_trace(self) -> None:
        """Make the optimizer step, not the forward, the unit of ZeRO-3's trace of parameter uses.

        As shipped, a hook restarts the trace at each forward. Under a pipeline the forwards and
        backwards of several micro batches interleave, the trace never fits, and without it DeepSpeed
        neither prefetches nor keeps parameters that are soon needed again.
        """
        leave_unread_weights(self.module)
        self.optimizer.parameter_offload.fwd_pre_hook.remove()
        if self.gathers_once:
            LastUses(self.optimizer.parameter_offload.get_param_coordinator()).answer()
        # The trace's check that all ranks agree speaks to the whole world in the middle of a forward,
        # while later stages still wait for their input: ask only the ranks that share the partitions.
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = _agreement_check(
            self.context[DATA_AXES].group
        )

    def _own_the_reductions(self) -> None:
        """Sums that DeepSpeed takes otherwise, or that have nothing to add."""
        begin_with_the_first(self.optimizer)
        if self.context["ep"].size > 1:
            self.optimizer._get_norm_groups = self._norm_of_partitions
        self.engine.buffered_allreduce_fallback = partial(
            self._reduce_whole, self.engine.buffered_allreduce_fallback
        )

    def _reduce_whole(self, shipped: Callable[..., None], **options: Any) -> None:
        """All gradients after the last backward, at ZeRO-0 and in bf16 with fp32 ones; of one rank nothing.

        DeepSpeed would put the gradients of one in one piece, round them to the format of communication, and
        copy them back.
        """
        clear_unreached(self.optimizer)
        if self.context[DATA_AXES].size > 1:
            shipped(**options)
        elif self.config.zero_stage == 0:
            for parameter in self.module.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def begin_step(self) -> None:
        """Call before each optimizer step."""
        self.begin_pass()
        if is_stage3(self.optimizer):
            clear_gradients(self.optimizer)

    def begin_pass(self) -> None:
        """Call before each forward-only pass."""
        if is_stage3(self.optimizer):
            self.optimizer.parameter_offload.get_param_coordinator().reset_step()

    def let_go(self) -> None:
        """Call when weights were written from outside: copies that ZeRO-3 has gathered are out of date.

        It keeps small ones for good, and looks at their partitions only after an optimizer step. So it does
        with the second partitions of hpZ, which it makes of what is gathered.
        """
        if is_stage3(self.optimizer):
            self.optimizer.parameter_offload.partition_all_parameters()
            self.optimizer.invalidate_secondary_tensor()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The stage in evaluation mode, for forward-only passes; afterwards it trains again."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def forward(self, x: torch.Tensor | None, batch: Batch, chunk: int) -> torch.Tensor:
        """A chunk's output; that of the head is the loss sum."""
        # By keyword: ZeRO-3's hooks look into positional arguments for tensors to watch.
        output = self.engine(x, batch=batch, chunk=chunk)
        if is_stage3(self.optimizer) and torch.is_grad_enabled() and chunk not in self._backwards_to_come:
            self._backwards_to_come[chunk] = {
                module: module.ds_grads_remaining  # type: ignore[misc]
                for module in (self.module, *self.module[chunk].modules())
                if hasattr(module, "ds_grads_remaining")
            }
        return output

    def backward(self, output: torch.Tensor, grad: torch.Tensor, chunk: int, *, is_last: bool) -> None:
        """Back-propagate one micro batch through a chunk.

        grad: the gradient of the output. is_last: no backward of the step follows, gradients are to be whole.
        """
        if is_stage3(self.optimizer):
            self._prepare_release(chunk)
        # The gradient of this product's sum is exactly `grad`. `output.backward(grad)` would be divided by
        # the number of micro batches, and is refused at ZeRO-0.
        self._back_propagate((output * grad).sum(), is_last)

    def backward_input(self, output: torch.Tensor, grad: torch.Tensor, chunk: int) -> list[Deferred]:
        """The same, less the gradients of weights that the layers left, for `backward_weight`."""
        assert self.deferred is not None
        self.backward(output, grad, chunk, is_last=False)
        return self.deferred.take()

    def backward_weight(self, left: Sequence[Deferred], *, is_last: bool) -> None:
        """Back-propagate to the weights. is_last: as above."""
        with with_shapes(self.optimizer, [weight for item in left for weight in item.weights]):
            scalar = scalar_of(left)
            # DeepSpeed begins a backward when the gradient of its engine's output comes: this is none.
            scalar.register_hook(lambda grad: self.engine._backward_prologue())
            self._back_propagate(scalar, is_last)

    def _back_propagate(self, scalar: torch.Tensor, is_last: bool) -> None:
        """A backward of DeepSpeed's, with its scale of the loss taken out."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        if hasattr(self.optimizer, "clear_backward_seen_flag"):
            # Forwards clear this mark; where two backwards follow each other, ZeRO-3 would let the second
            # one's gradients overwrite the first one's.
            self.optimizer.clear_backward_seen_flag()
        if self.gathers_once:
            # Modules whose input needs no gradient, as the stage itself, never count the backwards to come.
            # DeepSpeed lets go of them after each backward; here they are to stay until the last.
            offload = self.optimizer.parameter_offload
            release = offload.get_param_coordinator().release_backward_leftovers
            offload.release_backward_leftovers = release if is_last else _release_nothing
        self.engine.backward(scalar / self.loss_scale, scale_wrt_gas=False)

    def _prepare_release(self, chunk: int) -> None:
        """Let each module release its parameters in this backward, or keep them for the next.

        A module counts down the backwards that its last forward asked for, and releases at zero; where
        several backwards follow each other the count would pass below it, and all would stay gathered until
        the end of the backward, then leave at once. So the count is set again before each.
        """
        for module, count in self._backwards_to_come[chunk].items():
            module.ds_grads_remaining = count  # type: ignore[assignment]

    def step(self, learning_rate: float, refuses: Refuses | None = None) -> tuple[float, bool]:
        """Take the optimizer step, unless refuses(norm) holds: then nothing changes.

        Returns the global gradient norm before clipping, and whether the step was taken; one whose norm is no
        number never is.
        """
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        self._sum_tied_gradients()
        self._own_norm = self._gradient_norm() if self.config.zero_stage == 0 else None
        self._refuses, self._takes_step = refuses, None
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if self._own_norm is None else self._own_norm)
        return norm, bool(self._takes_step)

    def scale_rows(self, factors: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Let the next step multiply rows of parameters, as it leaves them, by these; [local rows] each.

        Masters are scaled within the update, so that weights of every format are made from them.
        """
        inner_optimizer(self.optimizer).row_factors = factors  # type: ignore[attr-defined]

    def _put_a_gate_before_the_update(self) -> None:
        """Let the torch optimizer within DeepSpeed's wrapper step only where the step is to be taken.

        The wrapper has the norm by then, and does the rest: it gives weights their masters, which did not
        change, and clears gradients. It steps once per parameter group; where the norm is no number, never.
        """
        inner = inner_optimizer(self.optimizer)
        update = inner.step

        def update_if_taken(*arguments: Any, **options: Any) -> Any:
            if self._takes_step is None:
                norm = float(self.optimizer._global_grad_norm if self._own_norm is None else self._own_norm)
                self._takes_step = isfinite(norm) and not (self._refuses and self._refuses(norm))
            return update(*arguments, **options) if self._takes_step else None

        inner.step = update_if_taken  # type: ignore[method-assign]

    def _sum_tied_gradients(self) -> None:
        """Give both copies of a tied embedding the gradient of both of its uses."""
        for parameter in self.tied:
            for gradient in reduced_gradients(self.optimizer, parameter):
                dist.all_reduce(gradient, group=self.context.tied_group)

    def _norm_of_partitions(self) -> list[torch.Tensor]:
        """The global norm in one sum over all ranks, in place of DeepSpeed's, which takes one per group.

        What ranks hold under ZeRO-3 are different elements, over edp as over dp: nothing counts twice. A
        stage without experts has fewer groups than others, which would wait for it. -1 is DeepSpeed's sign of
        a norm that is no number.
        """
        total = square_of_gradients(self.optimizer, lambda parameter: spec_of(parameter).is_owner)
        dist.all_reduce(total)
        return [torch.where(total.isfinite(), total.sqrt(), -1.0)]

    def _gradient_norm(self) -> torch.Tensor:
        """Norm over one model of all gradients, each counted once. At ZeRO-0 DeepSpeed keeps it to itself."""
        total = torch.zeros((), dtype=torch.float32, device=self.context.device)
        for parameter in self.module.parameters():
            if spec_of(parameter).is_owner and parameter.grad is not None:
                total += parameter.grad.float().square().sum()
        model = self.context[MODEL_AXES]
        if model.size > 1:
            dist.all_reduce(total, group=model.group)
        return total.sqrt()


class _Partitioning(deepspeed.zero.Init):
    """ZeRO-3 construction: parameters are partitioned at birth, experts over edp and others over dp x cp.

    DeepSpeed asks each parameter for its group and knows experts by a family's name; the divisor of their
    gradients is then the size of dp x cp, as for all others: each expert's are a sum over the tokens of ep.
    """

    def __init__(self, context: ParallelContext, **options: Any) -> None:
        self._experts = context["edp"].group
        if context["ep"].size > 1:  # its tables of groups, by a name of ours
            deepspeed.utils.groups._EXPERT_PARALLEL_GROUP[EXPERTS] = context["ep"].group
            deepspeed.utils.groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = self._experts
        # Its default, the world, would mix stages.
        super().__init__(data_parallel_group=context[DATA_AXES].group, **options)

    def _convert_to_deepspeed_param(self, parameter: Any) -> None:
        if spec_of(parameter).averaged_over != DATA_AXES:
            parameter.ds_zero_partition_process_group = self._experts
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = EXPERTS
        super()._convert_to_deepspeed_param(parameter)


def deepspeed_settings(
    config: DeepSpeedConfig,
    num_micro_batches: int,
    parameter_gathering: str,
    num_data_ranks: int,
    bucket_sizes: Mapping[str, int] = NO_SIZES,
) -> dict[str, Any]:
    """The user's DeepSpeed JSON, with what follows from the run filled in.

    num_data_ranks: that gradients are averaged over. DeepSpeed takes each for one with samples of its own; of
    them those of cp share theirs, so that its batch is cp_size times what the run calls one.
    """
    zero = config.raw.get("zero_optimization", {}) | bucket_sizes | {"stage": config.zero_stage}
    if config.zero_stage == 3:
        # A parameter whose next use is nearer than the reuse distance stays gathered. The limit of those that
        # are there stops prefetching alone.
        once = parameter_gathering == "step"
        zero["stage3_max_reuse_distance"] = NEVER_RELEASED if once else 0
        zero["stage3_max_live_parameters"] = zero.get("stage3_max_live_parameters", NEVER_RELEASED)
        # Sub-groups are groups to the gradient norm: every stage must have as many. See optimizer/recipe.py.
        zero["sub_group_size"] = NEVER_RELEASED
    return config.raw | {
        "zero_optimization": zero,
        "gradient_accumulation_steps": num_micro_batches,
        "train_micro_batch_size_per_gpu": config.train_micro_batch_size_per_gpu,
        "train_batch_size": config.train_micro_batch_size_per_gpu * num_micro_batches * num_data_ranks,
        "steps_per_print": NEVER_RELEASED,
    }


def _require_equal_groups(num_groups: int, context: ParallelContext) -> None:
    """Raise EngineError on every rank unless all stages train as many groups of parameters."""
    model = context[MODEL_AXES]
    numbers: list[Any] = [num_groups] * model.size
    if model.size > 1:
        dist.all_gather_object(numbers, num_groups, group=model.group)
    if len(set(numbers)) > 1:
        raise EngineError(
            f"stages train {min(numbers)} to {max(numbers)} groups of parameters (matrices, vectors) and "
            "need equally many: freeze a kind of parameter on all stages or none, or set parallel.pp_size=1"
        )


def _restore_buffers(module: nn.Module, state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put buffers that are state back as they were: DeepSpeed casts them to the weights' format."""
    for name, buffer in state.items():
        owner, _, own_name = name.rpartition(".")
        spec = spec_of(buffer)
        module.get_submodule(owner)._buffers[own_name] = kept = buffer.to(device)
        kept.spec = spec  # type: ignore[attr-defined]


def _release_nothing() -> None:
    """In place of DeepSpeed's release after a backward that another one follows."""


def _agreement_check(group: Group) -> Callable[[list[int]], None]:
    """A check that all ranks of a group hold the same numbers of modules or parameters.

    DeepSpeed counts on through all models of a process, and ranks may have built unlike ones before: so the
    numbers are compared as counted from the smallest.
    """

    def check(ints: list[int]) -> None:
        if group_size(group) == 1:
            return
        own = [number - min(ints) for number in ints]
        everyone: list[Any] = [None] * group_size(group)
        dist.all_gather_object(everyone, own, group=group)
        if any(other != own for other in everyone):
            raise RuntimeError("data-parallel ranks disagree on the order of parameters: this is a bug")

    return check
