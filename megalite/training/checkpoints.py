"""A run's checkpoints: what of a stage is state, and when it is read."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.adapter import check_same_adapter, is_adapter, open_weights
from megalite.checkpoint.agreement import on_all_ranks
from megalite.checkpoint.base import BASE, Base, base_of
from megalite.checkpoint.format import CheckpointError, Piece, folder_step
from megalite.checkpoint.load import find_checkpoint, load_pieces, read_config, read_state, require_checkpoint
from megalite.checkpoint.peft_folder import PeftFolder
from megalite.checkpoint.save import save_checkpoint
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.data.fingerprint import check_same_data
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import ShardSpec, spec_of, state_buffers
from megalite.training.engine import StageEngine
from megalite.training.start import find_start
from megalite.training.world import gather, on_rank_0
from megalite.training.zero import MasterSlice, inner_optimizer, local_weight, master_slices

PACKAGES = ("megalite", "torch", "deepspeed", "numpy")


class Checkpoints:
    """Saves and restores a stage under RUN_DIR/checkpoints; collective on all ranks.

    A run that trains adapters saves these alone, and which checkpoint the weights below them are of.

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
        self.base: Base | None = None  # of adapters, once they are resumed or started

    def resume(self, engine: StageEngine) -> int:
        """Restore the newest valid checkpoint, if there is one; returns its step, else 0.

        A run that has none, or one of step 0, begins with the weights alone: of that one, or of
        `checkpoint.start_from`. Adapters need such weights, which are then theirs to the end of the run.
        """
        settings = self.run.checkpoint
        folder = self._find(self.root) if settings.resume else None
        if folder is not None and folder_step(folder):
            return self._continue(engine, folder)
        if folder is None and settings.start_from is not None:
            folder = self._start_folder(settings.start_from)
        if folder is not None:
            self._start(engine, folder)
        elif self.run.lora.rank:
            raise CheckpointError(self._no_base())
        return 0

    def _find(self, path: Path) -> Path | None:
        return find_checkpoint(path, self.report, rank=self.rank, world_size=self.world_size, gather=gather)

    def start(self, engine: StageEngine) -> None:
        """Fill the stage with the weights that the run begins with, whether it has checkpoints or not."""
        self._start(engine, self._required_start())

    def start_fingerprint(self) -> str:
        """Of these weights, the adapters that they begin with among them; the same on all ranks."""
        folder, adapter = self._required_start(), self.run.lora.start_from

        def fingerprint() -> str:
            found = Base.of(folder).fingerprint
            return found if adapter is None else f"{found} {PeftFolder(Path(adapter)).fingerprint}"

        return on_rank_0(self.rank, fingerprint)

    def _required_start(self) -> Path:
        source = self.run.checkpoint.start_from
        assert source is not None, "the launchers of such runs refuse others"
        return self._start_folder(source)

    def _start_folder(self, source: str) -> Path:
        return self._find_start(find_start(source, self.run.output_dir, self.rank, self.report))

    def _find_start(self, path: Path) -> Path:
        return require_checkpoint(
            path,
            self.report,
            setting="checkpoint.start_from",
            rank=self.rank,
            world_size=self.world_size,
            gather=gather,
        )

    def _continue(self, engine: StageEngine, folder: Path) -> int:
        state = read_state(folder)
        self._check_batch_size(state, folder)
        if not self.run.data.allow_other_data:
            check_same_data(state.get("data", {}), self.data, where=str(folder))
        self._check_adapters(folder)
        trained, frozen = self._pieces(engine)
        load_pieces(folder, trained, rank=self.rank, gather=gather)
        self.base = base_of(folder)
        if self.base is not None:
            self._load_weights(self.base.folder, frozen)
        _set_optimizer_steps(engine, state["optimizer_steps"])
        self.report(f"resumed from {folder}")
        return state["step"]

    def _start(self, engine: StageEngine, folder: Path) -> None:
        trained, frozen = self._pieces(engine)
        if self.run.lora.rank:
            self.base = on_all_ranks(gather, lambda: Base.of(folder))
            on_all_ranks(gather, lambda: self._start_adapters(trained))
        self._load_weights(folder, frozen if self.run.lora.rank else trained)
        before, now = read_config(folder).model.model_dump(), self.run.model.model_dump()
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
        self.report(f"starts from the weights of {folder}" + "".join(f"; model.{text}" for text in changed))

    def _load_weights(self, folder: Path, pieces: list[Piece]) -> None:
        """Fill weights and buffers with those of a checkpoint; adapters in it are merged."""
        wanted = [piece for piece in pieces if piece.kind in ("weight", "buffer")]
        options: dict[str, Any] = {"ignore_other_kinds": True, "open_reader": open_weights}
        load_pieces(folder, wanted, rank=self.rank, gather=gather, **options)

    def _start_adapters(self, pieces: list[Piece]) -> None:
        """Take the adapters of lora.start_from, if it is given, in the place of new ones."""
        lora = self.run.lora
        if lora.start_from is None:
            return
        folder = PeftFolder(Path(lora.start_from))
        folder.check(lora, self.run.model)
        for piece in pieces:
            if piece.kind == "weight":
                piece.copy_from(folder.tensors[piece.name])
        self.report(f"starts with the adapter of {folder.path}")

    def _pieces(self, engine: StageEngine) -> tuple[list[Piece], list[Piece]]:
        """What belongs into this run's checkpoints, and what stays in those of its base."""
        pieces = list(live_pieces(engine))
        if not self.run.lora.rank:
            return pieces, []
        return [p for p in pieces if is_adapter(p.name)], [p for p in pieces if not is_adapter(p.name)]

    def _check_adapters(self, folder: Path) -> None:
        """A checkpoint of adapters goes on as the same ones, one of whole weights as whole weights."""
        if self.run.lora.rank or base_of(folder) is not None:
            check_same_adapter(read_config(folder).lora, self.run.lora, str(folder))

    def _no_base(self) -> str:
        return (
            f"lora.rank {self.run.lora.rank} trains adapters of weights that are there, and there are none: "
            "name them with checkpoint.start_from, or set lora.rank=0"
        )

    def _check_batch_size(self, state: Mapping[str, Any], folder: Path) -> None:
        """The place in the data follows from the step: another batch size would skip or repeat samples."""
        before, now = state["consumed_samples"] // state["step"], self.deepspeed.train_batch_size
        if before != now:
            raise CheckpointError(
                f"{folder} was trained with train_batch_size {before}, the DeepSpeed JSON says {now}: "
                f"keep {before}, or start another run with output_dir=..."
            )

    def save(self, engine: StageEngine, step: int) -> Path:
        """Write the checkpoint of a step. CheckpointError for adapters that have no base."""
        if self.run.lora.rank and self.base is None:
            raise CheckpointError(self._no_base())
        samples = step * self.deepspeed.train_batch_size
        state = {
            "step": step,
            "consumed_samples": samples,
            "consumed_tokens": samples * self.run.data.seq_length,
            "optimizer_steps": _optimizer_steps(engine),
            "versions": {name: _version(name) for name in PACKAGES},
            "data": self.data,
        }
        if self.base is not None:
            state[BASE] = self.base.record(self.root.parent)
        files = {
            "config.yaml": dump_run(self.run),
            "deepspeed.json": json.dumps(self.deepspeed.raw, indent=2) + "\n",
        }
        return save_checkpoint(
            self.root,
            step,
            self._pieces(engine)[0],
            state,
            files,
            rank=self.rank,
            world_size=self.world_size,
            gather=gather,
            keep_last=self.run.checkpoint.keep_last,
            base=self.base.folder if self.base is not None else None,
        )


def live_pieces(engine: StageEngine) -> Iterator[Piece]:
    """Views of all state on this rank: fp32 masters with the optimizer's state, weights, and buffers.

    Owned, and so saved, is what no other rank saves; padding is left out. The weights that forward uses are
    saved where they are not trained; else they are the masters, rounded, and there to be filled only.
    """
    optimizer, stage, context = engine.optimizer, engine.config.zero_stage, engine.context
    for part, state in _masters(engine):
        spec = spec_of(part.parameter)
        owned = spec.is_owner and (stage > 0 or is_first(spec, context))
        yield Piece.of(spec, "weight", part.view(part.flat), flat_start=part.start, owned=owned)
        for kind in engine.recipe.kinds:
            yield Piece.of(spec, kind, part.view(state[kind]), flat_start=part.start, owned=owned)
    for parameter in engine.module.parameters():
        spec = spec_of(parameter)
        start, weight = local_weight(optimizer, parameter, context[spec.averaged_over].rank)
        frozen = not parameter.requires_grad
        owned = frozen and spec.is_owner and (stage == 3 or is_first(spec, context))
        yield Piece.of(spec, "weight", weight, flat_start=start, owned=owned)
    for buffer in state_buffers(engine.module):
        spec = spec_of(buffer)
        owned = spec.is_owner and is_first(spec, context)
        yield Piece.of(spec, "buffer", buffer.view(-1), owned=owned)


def is_first(spec: ShardSpec, context: ParallelContext) -> bool:
    """Whether this rank is the first of those that hold the same of a tensor and see other data."""
    return context[spec.averaged_over].rank == 0


def _masters(engine: StageEngine) -> Iterator[tuple[MasterSlice, dict[str, torch.Tensor]]]:
    """This rank's masters, each with the optimizer's state of the tensor that it lies in."""
    inner = inner_optimizer(engine.optimizer)
    for parameter in engine.module.parameters():
        data_rank = engine.context[spec_of(parameter).averaged_over].rank
        for part in master_slices(engine.optimizer, [parameter], data_rank):
            yield part, engine.recipe.state_of(inner, part.flat)


def _optimizer_steps(engine: StageEngine) -> int:
    """Steps that the optimizer has taken; its bias correction needs them."""
    return max((engine.recipe.steps_of(state) for _, state in _masters(engine)), default=0)


def _set_optimizer_steps(engine: StageEngine, steps: int) -> None:
    for _, state in _masters(engine):
        engine.recipe.set_steps(state, steps)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
