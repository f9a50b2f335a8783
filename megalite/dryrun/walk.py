"""One rank's step, walked: the real model, schedule and trainer, on fake tensors, in one process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megalite.batch import Batch
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.dryrun.engine import WalkedEngine
from megalite.dryrun.log import TIED, Log
from megalite.dryrun.memory import LiveBytes
from megalite.dryrun.recorder import Recorder, recorded_world
from megalite.kernels.choice import Kernels
from megalite.kernels.sight import Sight
from megalite.model.llama import LlamaStage
from megalite.model.moe import RoutedExperts
from megalite.parallel.context import ParallelContext
from megalite.parallel.dispatch import Dispatch
from megalite.parallel.draws import Box
from megalite.pipeline.actions import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Handover,
    Transfer,
)
from megalite.pipeline.placement import Placement
from megalite.training.layout import topology_of
from megalite.training.trainer import StageTrainer

DEVICE = torch.device("meta")  # stands for a GPU, as in tests/test_devices.py
VERBS: dict[type, str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward to the input",
    BackwardWeight: "backward to the weights",
}


@dataclass(frozen=True)
class Walk:
    """What a rank did in a step.

    Attributes:
        log: what it said.
        layers: of each of its chunks.
        weight_bytes: the weights of its layers, whole.
        peak_bytes: the most that lived at a time in the passes, those weights among it.
        peak_place: what the rank was doing then.
        state_bytes: what it keeps beside these, by name.
    """

    log: Log
    layers: tuple[range, ...]
    weight_bytes: int
    peak_bytes: int
    peak_place: str
    state_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """The most that it needs at a time."""
        return self.peak_bytes + sum(self.state_bytes.values())


def walk(run: RunConfig, deepspeed: DeepSpeedConfig, rank: int, world_size: int) -> Walk:
    """Walk a rank's first step. torch.distributed must not be in use."""
    with recorded_world(rank, world_size) as recorder, FakeTensorMode():
        with LiveBytes(DEVICE, lambda: recorder.place) as memory:
            context = ParallelContext.build(topology_of(run, world_size), rank, DEVICE)
            recorder.name_groups(context, TIED)
            trainer = StageTrainer(
                run,
                deepspeed,
                context,
                build_engine=partial(WalkedEngine, recorder),  # type: ignore[arg-type]
                kernels=Kernels(_flash_attention, _fused_norm, names="fused"),
                init=_undrawn,
            )
            chunks: Any = trainer.engine.module
            _announce(trainer, chunks, recorder)
            weight_bytes = sum(parameter.nbytes for parameter in chunks.parameters())
            batches = deepspeed.num_micro_batches(context["dp"].size)
            trainer.train_step([_batch(run, deepspeed) for _ in range(batches)], learning_rate=1e-4)
        layers = tuple(chunk.share.layers for chunk in chunks)
        state: Any = trainer.engine
        return Walk(
            recorder.log, layers, weight_bytes, memory.peak, memory.peak_place, dict(state.state_bytes)
        )


def _announce(trainer: StageTrainer, chunks: Sequence[LlamaStage], recorder: Recorder) -> None:
    """Have the recorder know what the rank is doing."""
    trainer.runner = _Announcing(trainer.runner, trainer, recorder)  # type: ignore[assignment]
    for chunk in chunks:
        for layer, block in chunk.layers.items():
            _announce_layer(block, layer, recorder)
        for experts in (m for m in chunk.modules() if isinstance(m, RoutedExperts)):
            experts.dispatch = EvenDispatch


def _announce_layer(block: nn.Module, layer: str, recorder: Recorder) -> None:
    def reach(*_: Any) -> None:
        recorder.place = f"{recorder.place.partition(', layer')[0]}, layer {layer}"

    def leave(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(reach)

    block.register_forward_pre_hook(reach)
    block.register_forward_hook(leave)


class _Announcing:
    """A runner that tells each action before it walks it."""

    def __init__(self, runner: Any, trainer: StageTrainer, recorder: Recorder) -> None:
        self.runner, self.recorder = runner, recorder
        self.placement, self.pp_rank = trainer.placement, trainer.context["pp"].rank
        self.loss_chunk = runner.loss_chunk

    def train(self, actions: Sequence[Action], *arguments: Any) -> Any:
        return self.runner.train(self._told(actions), *arguments)

    def _told(self, actions: Sequence[Action]) -> Iterator[Action]:
        for action in actions:
            self.recorder.place = described(action)
            self.recorder.tensor = ""
            if isinstance(action, Transfer):
                self.recorder.tensor = tensor_of(action, self.pp_rank, self.placement)
            yield action
        self.recorder.place, self.recorder.tensor = "after the passes", ""


def described(action: Action) -> str:
    """An action in words."""
    if isinstance(action, Handover):
        return f"{action.kind} of micro batch {action.micro_batch} from chunk {action.source}"
    if isinstance(action, Transfer):
        return f"{action.verb} {action.kind} of micro batch {action.micro_batch}, chunk {action.chunk}"
    return f"{VERBS[type(action)]} of micro batch {action.micro_batch}, chunk {action.chunk}"


def tensor_of(transfer: Transfer, pp_rank: int, placement: Placement) -> str:
    """What a transfer carries, the same words at both ends."""
    stage = placement.stage(pp_rank, transfer.chunk)
    if transfer.verb == "receive":
        stage += -1 if transfer.kind == "activation" else 1
    return f"{transfer.kind} of micro batch {transfer.micro_batch} from stage {stage}"


class EvenDispatch(Dispatch):
    """As if tokens chose all experts equally often: the numbers that the host would read are not there."""

    def _numbers(self, rows: torch.Tensor) -> list[int]:
        share, remainder = divmod(len(self.order), len(rows))
        return [share + (place < remainder) for place in range(len(rows))]


def _batch(run: RunConfig, deepspeed: DeepSpeedConfig) -> Batch:
    shape = deepspeed.train_micro_batch_size_per_gpu, run.data.seq_length
    ids = torch.empty(shape, dtype=torch.int64)  # on the host, as loaders give it
    return Batch(ids, ids, document_starts=ids if run.data.mask_documents else None)


def _undrawn(name: str, full_shape: tuple[int, ...], box: Box | None = None) -> torch.Tensor:
    """A parameter without numbers."""
    shape = full_shape if box is None else [each.stop - each.start for each in box]
    return torch.empty(shape, device=DEVICE)


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight | None = None
) -> torch.Tensor:
    """What FlashAttention keeps: its inputs and output, and a number for each row. Documents cost nothing."""
    attend: Callable = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, 0.0, True)[0]


def _fused_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)[0]
