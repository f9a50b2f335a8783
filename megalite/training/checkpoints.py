"""A run's checkpoints: what of a stage is state, and when it is read."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megalite.checkpoint.adapter import check_same_adapter, is_adapter, open_weights
from megalite.checkpoint.agreement import Gather, on_all_ranks
from megalite.checkpoint.base import BASE, Base, base_of
from megalite.checkpoint.format import CheckpointError, Piece, folder_step, list_steps
from megalite.checkpoint.load import find_checkpoint, load_pieces, read_config, read_state, require_checkpoint
from megalite.checkpoint.local import LocalDiskError, NodeDisk, bring, carry, find_freight, save_locally
from megalite.checkpoint.peft_folder import PeftFolder
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.save import save_checkpoint
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.optimizer.slices import MasterSlice
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import ShardSpec, spec_of, state_buffers
from megalite.training.engine import StageEngine
from megalite.training.start import find_start
from megalite.training.versions import changed_versions, versions
from megalite.training.world import gather, on_rank_0
from megalite.training.zero import inner_optimizer, local_weight, loss_scale_state, set_loss_scale


@dataclass(frozen=True)
class Capture:
    """What this rank has for the checkpoint of a step: its pieces, and the state that rank 0 writes."""

    step: int
    pieces: list[Piece]
    state: Mapping[str, Any]


class Newest(NamedTuple):
    """The newest valid checkpoint of a run, if it has one, and its state: empty where no step was taken."""

    folder: Path | None
    state: Mapping[str, Any]


def find_newest(
    run: RunConfig, rank: int, report: Callable[[str], None], disk: NodeDisk | None = None
) -> Newest:
    """Of those in RUN_DIR/checkpoints, which `report` hears of where they are damaged; collective.

    disk: the nodes' own; where a checkpoint there is newer, and whole, it is carried to RUN_DIR/checkpoints.
    """
    if not run.checkpoint.resume:
        return Newest(None, {})
    root, ranks = Path(run.output_dir) / "checkpoints", {"rank": rank, "world_size": dist.get_world_size()}
    if disk is None:
        folder = find_checkpoint(root, report, **ranks, gather=gather)
    else:
        folder = _find_or_bring(disk, root, report, **ranks, gather=gather)
    return Newest(folder, read_state(folder) if folder is not None and folder_step(folder) else {})


def _find_or_bring(disk: NodeDisk, root: Path, report: Callable[[str], None], **ranks: Any) -> Path | None:
    """The newest of RUN_DIR/checkpoints once what the nodes have that is newer was carried there.

    What is damaged there is passed over for what the nodes have of the same step, or of one before.
    """
    tell = report if disk.rank == 0 else lambda text: None
    known = gather(max(list_steps(root), default=-1))[0]  # rank 0's: all are to look at the same
    bring(disk, range(known + 1, sys.maxsize), root, tell, gather=gather)
    folder, refusal = None, None
    try:
        folder = find_checkpoint(root, report, **ranks)
    except CheckpointError as error:  # on all ranks alike
        refusal = error
    found = -1 if folder is None else folder_step(folder) or 0
    brought = bring(disk, range(found + 1, known + 1), root, tell, gather=gather)
    if brought is not None:
        return find_checkpoint(brought, report, **ranks)
    if refusal is not None:
        raise refusal
    return folder


class Checkpoints:
    """Saves and restores a stage under RUN_DIR/checkpoints; collective on all ranks.

    A run that trains adapters saves these alone, and which checkpoint the weights below them are of.

    data: what the run reads, from `describe_data`.
    newest: what `find_newest` gave, if that was asked before.
    disk: the nodes' own, where saves go first.
    """

    def __init__(
        self,
        run: RunConfig,
        deepspeed: DeepSpeedConfig,
        rank: int,
        report: Callable[[str], None],
        data: Mapping[str, Any] | None = None,
        newest: Newest | None = None,
        disk: NodeDisk | None = None,
    ) -> None:
        self.run, self.deepspeed, self.data = run, deepspeed, dict(data or {})
        self.rank, self.world_size = rank, dist.get_world_size()
        self.root = Path(run.output_dir) / "checkpoints"
        self.report = report
        self.base: Base | None = None  # of adapters, once they are resumed or started
        self._newest, self._disk = newest, disk

    def look(self) -> Mapping[str, Any]:
        """The state of the newest valid checkpoint, from which `resume` goes on; empty without one."""
        self._newest = find_newest(self.run, self.rank, self.report, self._disk)
        return self._newest.state

    def resume(self, engine: StageEngine) -> int:
        """Restore the newest valid checkpoint, if there is one; returns its step, else 0.

        A run that has none, or one of step 0, begins with the weights alone: of that one, or of
        `checkpoint.start_from`. Adapters need such weights, which are then theirs to the end of the run.
        """
        folder, state = self._newest or find_newest(self.run, self.rank, self.report, self._disk)
        self._newest = None  # by the next time there may be another
        if folder is not None and state:
            return self._continue(engine, folder, state)
        start_from = self.run.checkpoint.start_from
        if folder is None and start_from is not None:
            folder = self._start_folder(start_from)
        if folder is not None:
            self._start(engine, folder)
        elif self.run.lora.rank:
            raise CheckpointError(self._no_base())
        return 0

    def go_back(self, engine: StageEngine) -> Mapping[str, Any]:
        """Restore the checkpoint that `look` has found, whose files need no second look; its state."""
        assert self._newest is not None
        state = self._newest.state
        self.resume(engine)
        return state

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

    def _continue(self, engine: StageEngine, folder: Path, state: Mapping[str, Any]) -> int:
        self._check_adapters(folder)
        trained, frozen = self._pieces(engine)
        load_pieces(folder, trained, rank=self.rank, gather=gather)
        self.base = base_of(folder)
        if self.base is not None:
            self._load_weights(self.base.folder, frozen)
        engine.let_go()
        _set_optimizer_steps(engine, state["optimizer_steps"])
        set_loss_scale(engine.optimizer, state.get("loss_scale", {}))
        samples, step = state["consumed_samples"], state["step"]
        after = "" if samples == step * self.deepspeed.train_batch_size else f", after {samples:,} samples"
        self.report(f"resumed from {folder}{after}")
        changed = changed_versions(state.get("versions", {}), versions())
        if changed:
            self.report(f"versions since {folder.name}: {changed}; numbers may differ in their last bits")
        return step

    def _start(self, engine: StageEngine, folder: Path) -> None:
        trained, frozen = self._pieces(engine)
        if self.run.lora.rank:
            self.base = on_all_ranks(gather, lambda: Base.of(folder))
            on_all_ranks(gather, lambda: self._start_adapters(trained))
        self._load_weights(folder, frozen if self.run.lora.rank else trained)
        engine.let_go()
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

    def save(self, engine: StageEngine, step: int, standing: Mapping[str, Any] | None = None) -> Path:
        """Write the checkpoint of a step. CheckpointError for adapters that have no base."""
        return self.write(self.capture(engine, step, standing), gather)

    def capture(self, engine: StageEngine, step: int, standing: Mapping[str, Any] | None = None) -> Capture:
        """What the checkpoint of a step is to hold; its pieces are live. CheckpointError as in `save`.

        standing: what else the run is to know of itself when it goes on: its state, JSON-able, by name;
            without `consumed_samples` it has taken equal batches from its first step on.
        """
        if self.run.lora.rank and self.base is None:
            raise CheckpointError(self._no_base())
        standing = {"consumed_samples": step * self.deepspeed.train_batch_size} | dict(standing or {})
        state = {
            "step": step,
            **standing,
            "consumed_tokens": standing["consumed_samples"] * self.run.tokens_per_sample,
            "optimizer_steps": _optimizer_steps(engine),
            "loss_scale": loss_scale_state(engine.optimizer),
            "versions": versions(),
            "data": self.data,
        }
        if self.base is not None:
            state[BASE] = self.base.record(self.root.parent)
        return Capture(step, self._pieces(engine)[0], state)

    def write(self, capture: Capture, gather: Gather, *, share: bool = True) -> Path:
        """Write what was captured; its folder. Touches nothing that training changes but the pieces.

        gather: over the ranks; a thread beside the training needs one of its own.
        share: whether what is on the nodes' own disks goes to RUN_DIR/checkpoints as well.
        """
        content = capture.step, capture.pieces, capture.state, self._files()
        if self._disk is not None:
            try:
                folder = save_locally(self._disk, *content, gather=gather)
                return self.share(capture.step, gather) if share else folder
            except LocalDiskError as error:  # on all ranks alike
                self.report(f"{error}; it goes to {self.root} at once")
        return save_checkpoint(
            self.root,
            *content,
            rank=self.rank,
            world_size=self.world_size,
            gather=gather,
            retention=self._retention,
            base=self._base_folder,
        )

    def share(self, step: int, gather: Gather) -> Path:
        """Carry the checkpoint that the nodes have of a step to RUN_DIR/checkpoints; its folder there."""
        assert self._disk is not None
        freight = find_freight(self._disk, step, gather=gather)
        kept: dict[str, Any] = {"retention": self._retention, "base": self._base_folder}
        return carry(self._disk, freight, self.root, gather=gather, **kept)

    def is_shared(self, folder: Path) -> bool:
        """Whether a checkpoint is in RUN_DIR/checkpoints."""
        return folder.parent == self.root

    def _files(self) -> dict[str, str]:
        deepspeed = json.dumps(self.deepspeed.raw, indent=2) + "\n"
        return {"config.yaml": dump_run(self.run), "deepspeed.json": deepspeed}

    @property
    def _retention(self) -> Retention:
        settings = self.run.checkpoint
        return Retention(settings.keep_last, settings.keep_every_steps, settings.keep_best)

    @property
    def _base_folder(self) -> Path | None:
        return self.base.folder if self.base is not None else None


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
        for kind in engine.recipe.kinds_of(spec.name, spec.full_shape):
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
    for part in engine.masters():
        yield part, engine.recipe.state_of(inner, part.flat, spec_of(part.parameter))


def _optimizer_steps(engine: StageEngine) -> int:
    """Steps that the optimizer has taken; its bias correction needs them."""
    return max((engine.recipe.steps_of(state) for _, state in _masters(engine)), default=0)


def _set_optimizer_steps(engine: StageEngine, steps: int) -> None:
    for _, state in _masters(engine):
        engine.recipe.set_steps(state, steps)
