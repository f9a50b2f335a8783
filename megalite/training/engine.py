"""One plain DeepSpeed engine around one pipeline stage; the only importer of deepspeed.

DeepSpeed's own PipelineEngine stops at ZeRO-1. A plain engine a stage, driven by our schedule, goes to
ZeRO-3, if a few of the engine's habits are minded; each is explained where it is.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import nn

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import OptimizerConfig
from megalite.parallel.context import Group, ParallelContext, group_size
from megalite.parallel.mpu import ModelParallelUnit
from megalite.parallel.shard import spec_of
from megalite.training.zero import is_stage3, reduced_gradients

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEVER_RELEASED = int(1e15)  # elements: a reuse distance that no model reaches


def initialize_communication() -> None:
    """Tell DeepSpeed of the process group that exists, without its optional shared-memory operator.

    DeepSpeed would compile that operator for a minute at first use, and wait for ever where an
    interrupted compile has left its lock. Training needs none of it.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed uses
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


class StageEngine:
    """Forward, backward and optimizer step of one stage, for ZeRO 0, 1, 2 and 3.

    Args:
        build_module: makes the stage; under ZeRO-3 each layer is partitioned as it is made.
        optimizer: AdamW's numbers; the learning rate comes with each step.
        config: the DeepSpeed configuration.
        context: process groups.
        num_micro_batches: in one optimizer step.
        parameter_gathering: under ZeRO-3, gather a stage's parameters once a "step" or once a
            "micro_batch" and direction.
    """

    def __init__(
        self,
        build_module: Callable[[], nn.Module],
        optimizer: OptimizerConfig,
        config: DeepSpeedConfig,
        context: ParallelContext,
        *,
        num_micro_batches: int,
        parameter_gathering: str = "step",
    ) -> None:
        self.config = config
        self.context = context
        self.dtype = TORCH_DTYPES[config.precision]
        settings = deepspeed_settings(config, num_micro_batches, parameter_gathering)
        mpu = ModelParallelUnit(context)
        with deepspeed.zero.Init(
            enabled=config.zero_stage == 3,
            data_parallel_group=context.dp_group,  # its default, the world, would mix stages
            config_dict_or_path=settings,
            mpu=mpu,
            # No dtype: on a CPU, which has no fp16, Init takes any dtype given for bf16.
            mem_efficient_linear=False,  # our layers keep no transposed views: see parallel/linear.py
        ):
            module = build_module()
        self.engine, *_ = deepspeed.initialize(
            model=module.to(context.device) if config.zero_stage < 3 else module,
            optimizer=build_optimizer(module, optimizer),
            config=settings,
            mpu=mpu,
            dist_init_required=False,
        )
        self.optimizer = self.engine.optimizer
        self._backwards_to_come: dict[nn.Module, int] = {}
        self.gathers_once = config.zero_stage == 3 and parameter_gathering == "step"
        self.tied = [p for p in module.parameters() if spec_of(p).tied and context.pp_size > 1]
        if config.zero_stage == 3:
            self._own_the_trace()

    @property
    def module(self) -> nn.Module:
        """The stage."""
        return self.engine.module

    def _own_the_trace(self) -> None:
        """Make the optimizer step, not the forward, the unit of ZeRO-3's trace of parameter uses.

        As shipped, a hook restarts the trace at each forward. Under a pipeline the forwards and
        backwards of several micro batches interleave, the trace never fits, and without it DeepSpeed
        neither prefetches nor keeps parameters that are soon needed again.
        """
        self.optimizer.parameter_offload.fwd_pre_hook.remove()
        # The trace's check that all ranks agree speaks to the whole world in the middle of a forward,
        # while later stages still wait for their input: ask only the ranks that share the partitions.
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = _agreement_check(
            self.context.dp_group
        )

    def begin(self) -> None:
        """Call before each optimizer step, and before each forward-only pass."""
        if is_stage3(self.optimizer):
            self.optimizer.parameter_offload.get_param_coordinator().reset_step()

    def train(self, mode: bool) -> None:
        """Training (True) or evaluation mode of the stage."""
        self.module.train(mode)

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The stage's output; on the last stage the loss."""
        output = self.engine(x, labels, document_starts)
        if is_stage3(self.optimizer) and torch.is_grad_enabled() and not self._backwards_to_come:
            self._backwards_to_come = {
                module: module.ds_grads_remaining  # type: ignore[misc]
                for module in self.module.modules()
                if hasattr(module, "ds_grads_remaining")
            }
        return output

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None, *, is_last: bool) -> None:
        """Back-propagate one micro batch.

        grad: the gradient of the output, None on the last stage, whose output is the loss. is_last: this
        is the last micro batch of the step, after which gradients are to be whole.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        if hasattr(self.optimizer, "clear_backward_seen_flag"):
            # Forwards clear this mark; where two backwards follow each other, ZeRO-3 would let the second
            # one's gradients overwrite the first one's.
            self.optimizer.clear_backward_seen_flag()
        if is_stage3(self.optimizer):
            self._prepare_release(is_last)
        if grad is None:
            self.engine.backward(output)  # divides by the number of micro batches: here, and only here
            return
        # The gradient of this product's sum is exactly `grad`. `output.backward(grad)` would be divided
        # again at each stage, and is refused at ZeRO-0.
        self.engine.backward((output * grad).sum() / self._loss_scale(), scale_wrt_gas=False)

    def _prepare_release(self, is_last: bool) -> None:
        """Let each module release its parameters in this backward, or keep them for the next.

        A module counts down the backwards that its last forward asked for, and releases at zero; where
        several backwards follow each other the count would pass below it, and all would stay gathered until
        the end of the backward, then leave at once. So the count is set again before each.

        Modules whose input needs no gradient, the embedding, never count. DeepSpeed lets go of them after
        each backward; gathering once a step, they are to stay until the last.
        """
        for module, count in self._backwards_to_come.items():
            module.ds_grads_remaining = count  # type: ignore[assignment]
        offload = self.optimizer.parameter_offload
        if self.gathers_once:
            coordinator = offload.get_param_coordinator()
            offload.release_backward_leftovers = (
                coordinator.release_backward_leftovers if is_last else _release_nothing
            )

    def _loss_scale(self) -> float:
        """fp16's loss scale, which DeepSpeed multiplies in at every stage and the last one alone needs."""
        return self.optimizer.loss_scale if self.config.precision == "fp16" else 1.0

    def step(self, learning_rate: float) -> float:
        """Take the optimizer step; returns the global gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._sum_tied_gradients()
        norm = self._gradient_norm() if self.config.zero_stage == 0 else None
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _sum_tied_gradients(self) -> None:
        """Give both copies of a tied embedding the gradient of both of its uses."""
        for parameter in self.tied:
            for gradient in reduced_gradients(self.optimizer, parameter):
                dist.all_reduce(gradient, group=self.context.tied_group)

    def _gradient_norm(self) -> torch.Tensor:
        """Norm over tp x pp of all gradients, each counted once. At ZeRO-0 DeepSpeed keeps it to itself."""
        total = torch.zeros((), dtype=torch.float32, device=self.context.device)
        for parameter in self.module.parameters():
            if spec_of(parameter).is_owner:
                assert parameter.grad is not None
                total += parameter.grad.float().square().sum()
        if group_size(self.context.model_parallel_group) > 1:
            dist.all_reduce(total, group=self.context.model_parallel_group)
        return total.sqrt()


def deepspeed_settings(
    config: DeepSpeedConfig, num_micro_batches: int, parameter_gathering: str
) -> dict[str, Any]:
    """The user's DeepSpeed JSON, with what follows from the run filled in."""
    zero = dict(config.raw.get("zero_optimization", {}), stage=config.zero_stage)
    if config.zero_stage == 3:
        # A parameter whose next use is nearer than the reuse distance stays gathered.
        once = parameter_gathering == "step"
        zero["stage3_max_reuse_distance"] = NEVER_RELEASED if once else 0
        zero["stage3_max_live_parameters"] = NEVER_RELEASED if once else 0
        # Sub-groups are groups to the gradient norm: every stage must have as many. See parameter_groups.
        zero["sub_group_size"] = NEVER_RELEASED
    return config.raw | {
        "zero_optimization": zero,
        "gradient_accumulation_steps": num_micro_batches,
        "steps_per_print": NEVER_RELEASED,
    }


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2017, arXiv 1711.05101) with weight decay on matrices alone."""
    decays = [config.weight_decay, config.weight_decay, 0.0]
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in zip(parameter_groups(module), decays, strict=True)
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,  # one pass over memory, and none of it taken for intermediate results
    )


def parameter_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """One matrix alone, the other matrices, and the vectors.

    Alone is a tied embedding, so that its gradients can be told from others' in a flat partition. A stage
    without one sets another matrix apart: DeepSpeed reduces the gradient norm once a group over all
    stages, and a stage with fewer groups would leave the others waiting.
    """
    parameters = list(module.parameters())
    matrices = [p for p in parameters if len(spec_of(p).full_shape) > 1]
    alone = next((p for p in matrices if spec_of(p).tied), matrices[0])
    return [
        [alone],
        [p for p in matrices if p is not alone],
        [p for p in parameters if len(spec_of(p).full_shape) == 1],
    ]


def _release_nothing() -> None:
    """In place of DeepSpeed's release after a backward that another one follows."""


def _agreement_check(group: Group) -> Callable[[list[int]], None]:
    """A check that all ranks of a group hold the same integers."""

    def check(ints: list[int]) -> None:
        if group_size(group) == 1:
            return
        everyone: list[Any] = [None] * group_size(group)
        dist.all_gather_object(everyone, ints, group=group)
        if any(other != ints for other in everyone):
            raise RuntimeError("data-parallel ranks disagree on the order of parameters: this is a bug")

    return check
