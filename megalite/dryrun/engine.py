"""In the place of DeepSpeed's engine: plain autograd on fake tensors, and what ZeRO says, as it is known to.

DeepSpeed itself is not walked. Its collectives are written down where they belong, as one for each block of
layers or bucket of gradients:

    stage 3         weights gathered at a block's first forward of a step, or in every forward and backward
                    that reads them; gradients reduce-scattered in every backward
    stage 2         gradients reduce-scattered in every backward; weights gathered after the update
    stages 1, 0     gradients reduce-scattered, or all-reduced, after the last backward; weights as above

and the gradient norm as one sum over the ranks of the data and one over those of the model, for each group of
parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from megalite.batch import Batch
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.dryrun.log import TIED
from megalite.dryrun.recorder import Recorder
from megalite.model.llama import LlamaStage
from megalite.optimizer.recipe import ParameterGroup, Recipe
from megalite.parallel.context import ParallelContext
from megalite.parallel.deferred import Deferred, DeferredGradients, scalar_of
from megalite.parallel.shard import spec_of
from megalite.parallel.topology import DATA_AXES, MODEL_AXES
from megalite.training.precision import TORCH_DTYPES

FP32_BYTES = 4


class WalkedEngine:
    """What a StageTrainer drives, in a walk; see StageEngine for what each method is.

    recorder: learns what is said.
    """

    loss_scale = 1.0

    def __init__(
        self,
        recorder: Recorder,
        build_chunks: Callable[[], Sequence[nn.Module]],
        recipe: Recipe,
        config: DeepSpeedConfig,
        context: ParallelContext,
        *,
        num_micro_batches: int,
        parameter_gathering: str,
        bucket_sizes: Mapping[str, int],
        deferred: DeferredGradients | None,
    ) -> None:
        self.recorder, self.config, self.context, self.recipe = recorder, config, context, recipe
        self.deferred, self.dtype = deferred, TORCH_DTYPES[config.precision]
        with _default_dtype(self.dtype):
            self.module = nn.ModuleList(build_chunks())
        _place(self.module, context.device)
        self.groups = recipe.groups(list(self.module.parameters()))
        self.trained = [parameter for group in self.groups for parameter in group.parameters]
        self.gathers_once = parameter_gathering == "step"
        self.stage = config.zero_stage
        self._gathered: set[int] = set()  # chunks
        self._bucket: list[nn.Parameter] = []
        self._bucket_elements = bucket_sizes["reduce_bucket_size"]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._see_gradient)

    @property
    def state_bytes(self) -> dict[str, int]:
        """What a rank keeps from step to step beside the weights that forward uses, by name."""
        return _state_bytes(self.groups, self.recipe, self.stage, self.dtype, self.context)

    def begin_step(self) -> None:
        self._gathered.clear()

    def begin_pass(self) -> None: ...

    def evaluating(self) -> nullcontext:
        return nullcontext()

    def forward(self, x: torch.Tensor | None, batch: Batch, chunk: int) -> torch.Tensor:
        if chunk not in self._gathered or not self.gathers_once:
            self._gather(chunk)
        return self.module[chunk](x, batch)

    def backward(self, output: torch.Tensor, grad: torch.Tensor, chunk: int, *, is_last: bool) -> None:
        if not self.gathers_once:
            self._gather(chunk, of_backward=True)
        self._back_propagate((output * grad).sum(), is_last)

    def backward_input(self, output: torch.Tensor, grad: torch.Tensor, chunk: int) -> list[Deferred]:
        assert self.deferred is not None
        self.backward(output, grad, chunk, is_last=False)
        return self.deferred.take()

    def backward_weight(self, left: Sequence[Deferred], *, is_last: bool) -> None:
        self._back_propagate(scalar_of(left), is_last)

    def step(self, learning_rate: float, refuses: Any = None) -> tuple[float, bool]:
        """The collectives of a step; nothing is changed."""
        self.recorder.place = "optimizer step"
        for parameter in self.trained:
            if spec_of(parameter).is_tied:
                self._say("all_reduce", TIED, self._partition(parameter) * FP32_BYTES)
        for _ in self.groups:
            for axes in (DATA_AXES, MODEL_AXES):
                self._say("all_reduce", axes, FP32_BYTES)
        if self.stage in (1, 2):
            for group in self.groups:
                self._say("all_gather", DATA_AXES, sum(p.nbytes for p in group.parameters))
        self.recorder.place = "after the step"
        return 1.0, True

    def scale_rows(self, factors: Mapping[nn.Parameter, torch.Tensor]) -> None: ...

    def _back_propagate(self, scalar: torch.Tensor, is_last: bool) -> None:
        scalar.backward()
        if self.stage >= 2:
            self._flush()
        elif is_last:
            self._reduce_all()

    def _gather(self, chunk: int, *, of_backward: bool = False) -> None:
        """ZeRO-3's weights of a chunk, block by block; backward's are those that it reads."""
        self._gathered.add(chunk)
        if self.stage < 3:
            return
        stage: LlamaStage = self.module[chunk]  # type: ignore[assignment]
        blocks = list(stage.layers.values())
        ends = [part for part in (stage.embed_tokens, stage.norm, stage.lm_head) if part is not None]
        for part in (*ends, *blocks):
            if of_backward and not getattr(part, "reads_weight_in_backward", True):
                continue
            self._say_by_axes("all_gather", list(part.parameters()))

    def _see_gradient(self, parameter: nn.Parameter) -> None:
        if self.stage < 2:
            return
        self._bucket.append(parameter)
        if sum(p.numel() for p in self._bucket) >= self._bucket_elements:
            self._flush()

    def _flush(self) -> None:
        """Reduce the gradients of the bucket, and let them go."""
        self._say_by_axes("reduce_scatter", self._bucket)
        for parameter in self._bucket:
            parameter.grad = None
        self._bucket.clear()

    def _reduce_all(self) -> None:
        kind, bucket = "reduce_scatter" if self.stage else "all_reduce", []
        for parameter in self.trained:
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) >= self._bucket_elements:
                self._say_by_axes(kind, bucket)
                bucket.clear()
        self._say_by_axes(kind, bucket)

    def _say_by_axes(self, kind: str, parameters: Sequence[nn.Parameter]) -> None:
        """One collective for the parameters that lie over the same ranks."""
        by_axes: dict[tuple[str, ...], int] = {}
        for parameter in parameters:
            axes = spec_of(parameter).averaged_over
            by_axes[axes] = by_axes.get(axes, 0) + parameter.nbytes
        for axes, num_bytes in by_axes.items():
            self._say(kind, axes, num_bytes)

    def _say(self, kind: str, axes: tuple[str, ...] | str, num_bytes: int) -> None:
        group: Any = self.context.tied_group if axes == TIED else self.context[axes].group
        if group is not None and group.size() > 1:
            self.recorder.call(self.recorder.names[group.members], kind, num_bytes, is_modelled=True)

    def _partition(self, parameter: nn.Parameter) -> int:
        """Elements of a parameter whose gradient a rank holds when it steps."""
        return _partition(parameter, self.context) if self.stage else parameter.numel()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _place(module: nn.Module, device: torch.device) -> None:
    """What NumPy made, on the device, with its specs, which `Module.to` would drop."""
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.device != device:
                    table[name] = placed = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        table[name] = placed = nn.Parameter(placed, tensor.requires_grad)
                    kept = {mark for mark in ("spec", "model_parallel") if hasattr(tensor, mark)}
                    placed.__dict__.update({mark: getattr(tensor, mark) for mark in kept})


def _partition(parameter: nn.Parameter, context: ParallelContext) -> int:
    """Elements of a parameter that a rank has, where it is cut over all that have the same."""
    return -(-parameter.numel() // context[spec_of(parameter).averaged_over].size)


def _state_bytes(
    groups: Sequence[ParameterGroup],
    recipe: Recipe,
    stage: int,
    dtype: torch.dtype,
    context: ParallelContext,
) -> dict[str, int]:
    parameters = [parameter for group in groups for parameter in group.parameters]
    cut = partial(_partition, context=context)
    own = sum(cut(p) if stage else p.numel() for p in parameters)
    kinds = sum(
        (cut(p) if stage else p.numel()) * len(recipe.kinds_of(spec_of(p).name, spec_of(p).full_shape))
        for p in parameters
    )
    of_gradients = sum(cut(p) if stage >= 2 else p.numel() for p in parameters)
    has_masters = stage > 0 or dtype != torch.float32
    return {
        "fp32 masters": FP32_BYTES * own if has_masters else 0,
        "optimizer state": FP32_BYTES * kinds,
        "summed gradients, fp32": FP32_BYTES * of_gradients if stage else 0,
        "partitions of weights": sum(map(cut, parameters)) * dtype.itemsize if stage == 3 else 0,
    }
