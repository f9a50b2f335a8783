"""A run's checkpoints: what of a replica is state, and when it is read."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.format import CheckpointError, Piece
from megalite.checkpoint.load import find_checkpoint, load_pieces, read_state
from megalite.checkpoint.save import save_checkpoint
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.data.fingerprint import check_same_data
from megalite.parallel.shard import ShardSpec, spec_of
from megalite.training.engine import StageEngine
from megalite.training.zero import ADAM_MOMENTS, adam_state, is_stage3, master_slices

PACKAGES = ("megalite", "torch", "deepspeed", "numpy")


class Checkpoints:
    """Saves and restores a replica under RUN_DIR/checkpoints; collective on all ranks.

    data: what the run reads, from `describe_data`; a checkpoint that was trained on other data is refused.
    """

    def __init__(
        self,
        run: RunConfig,
        deepspeed: DeepSpeedConfig,
        rank: int,
        report: Callable[[str], None],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.deepspeed, self.data = run, deepspeed, dict(data or {})
        self.rank, self.world_size = rank, dist.get_world_size()
        self.root = Path(run.output_dir) / "checkpoints"
        self.report = report

    def resume(self, engine: StageEngine) -> int:
        """Restore the newest valid checkpoint, if there is one; returns its step, else 0."""
        if not self.run.checkpoint.resume:
            return 0
        folder = find_checkpoint(
            self.root, self.report, rank=self.rank, world_size=self.world_size, gather=gather
        )
        if folder is None:
            return 0
        state = read_state(folder)
        self._check_batch_size(state, folder)
        if not self.run.data.allow_other_data:
            check_same_data(state.get("data", {}), self.data, where=str(folder))
        load_pieces(folder, list(live_pieces(engine)), rank=self.rank, gather=gather)
        _set_optimizer_steps(engine, state["optimizer_steps"])
        self.report(f"resumed from {folder}")
        return state["step"]

    def _check_batch_size(self, state: Mapping[str, Any], folder: Path) -> None:
        """The place in the data follows from the step: another batch size would skip or repeat samples."""
        before, now = state["consumed_samples"] // state["step"], self.deepspeed.train_batch_size
        if before != now:
            raise CheckpointError(
                f"{folder} was trained with train_batch_size {before}, the DeepSpeed JSON says {now}: "
                f"keep {before}, or start another run with output_dir=..."
            )

    def save(self, engine: StageEngine, step: int) -> Path:
        """Write the checkpoint of a step."""
        samples = step * self.deepspeed.train_batch_size
        state = {
            "step": step,
            "consumed_samples": samples,
            "consumed_tokens": samples * self.run.data.seq_length,
            "optimizer_steps": _optimizer_steps(engine),
            "versions": {name: _version(name) for name in PACKAGES},
            "data": self.data,
        }
        files = {
            "config.yaml": dump_run(self.run),
            "deepspeed.json": json.dumps(self.deepspeed.raw, indent=2) + "\n",
        }
        return save_checkpoint(
            self.root,
            step,
            list(live_pieces(engine)),
            state,
            files,
            rank=self.rank,
            world_size=self.world_size,
            gather=gather,
            keep_last=self.run.checkpoint.keep_last,
        )


def gather(value: Any) -> list[Any]:
    """Every rank's object, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def live_pieces(engine: StageEngine) -> Iterator[Piece]:
    """Views of all state on this rank: fp32 masters and both moments, and the weights made from them.

    Owned, and so saved, is what no other rank saves; padding is left out. The stage's own weights are
    there to be filled, not saved: they are the masters, rounded.
    """
    context, optimizer = engine.context, engine.optimizer
    parameters = list(engine.module.parameters())
    everyone_has_it = engine.config.zero_stage == 0
    for part in master_slices(optimizer, parameters, context.dp_rank):
        spec = spec_of(part.parameter)
        owned = spec.is_owner and not (everyone_has_it and context.dp_rank)
        state = adam_state(optimizer, part.flat)
        yield _piece(spec, "weight", part.start, part.view(part.flat), owned)
        for moment in ADAM_MOMENTS:
            yield _piece(spec, moment, part.start, part.view(state[moment]), owned)
    for parameter in parameters:
        start, weight = _own_weights(parameter, is_stage3(optimizer), context.dp_rank)
        yield _piece(spec_of(parameter), "weight", start, weight, owned=False)


def _own_weights(parameter: Any, partitioned: bool, dp_rank: int) -> tuple[int, torch.Tensor]:
    """The stage's weights on this rank, flat, and where they begin in the rank's parameter."""
    if not partitioned:
        return 0, parameter.detach().view(-1)
    start = dp_rank * parameter.ds_tensor.ds_numel
    kept = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
    return start, parameter.ds_tensor.detach().view(-1)[:kept]


def _piece(spec: ShardSpec, kind: str, start: int, tensor: torch.Tensor, owned: bool) -> Piece:
    """Rows of padding are the last ones of a rank, so what counts is the front of the flat tensor."""
    size = prod(spec.box_shape)
    return Piece(
        name=spec.name,
        kind=kind,
        full_shape=spec.full_shape,
        box_start=spec.box_start,
        box_shape=spec.box_shape,
        flat_start=min(start, size),
        tensor=tensor[: max(0, size - start)],
        owned=owned,
    )


def _optimizer_steps(engine: StageEngine) -> int:
    """Steps that Adam has taken; its bias correction needs them."""
    slices = master_slices(engine.optimizer, engine.module.parameters(), engine.context.dp_rank)
    return max((int(adam_state(engine.optimizer, part.flat)["step"]) for part in slices), default=0)


def _set_optimizer_steps(engine: StageEngine, steps: int) -> None:
    for part in master_slices(engine.optimizer, engine.module.parameters(), engine.context.dp_rank):
        adam_state(engine.optimizer, part.flat)["step"].fill_(steps)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
