"""Find the newest valid checkpoint, and fill live tensors from it, whatever layout wrote it."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megalite.checkpoint.agreement import Gather, alone, on_all_ranks
from megalite.checkpoint.base import base_of
from megalite.checkpoint.damage import find_damage
from megalite.checkpoint.format import (
    CONFIG,
    STATE,
    WIDEST_DTYPE,
    CheckpointError,
    Manifest,
    Piece,
    PieceRow,
    Region,
    Shape,
    check_region,
    folder_step,
    rank_file,
    read_manifest,
    step_folders,
)
from megalite.checkpoint.reshard import Window, overlaps
from megalite.checkpoint.tensor_file import TensorFile
from megalite.config.load import load_run
from megalite.config.run import RunConfig

# Which checkpoint

PLACES = "RUN_DIR/checkpoints, RUN_DIR or one step's folder"  # where a checkpoint may be named


def find_checkpoint(
    path: Path,
    report: Callable[[str], None] = print,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = alone,
) -> Path | None:
    """The newest valid checkpoint at `path`: every file of its manifest there, with its size and sha256.

    Of one of adapters, the base must be valid as well, and the one that they were trained on.

    path: RUN_DIR/checkpoints or RUN_DIR, where damaged ones are skipped (`report` gets a line that says which
        and why); or one step folder, which must be valid.
    rank, world_size, gather: many ranks share out the checksums among them, and all get the same answer.

    None when there is no checkpoint at all. Raises CheckpointError when there are some and none is valid:
    starting again from nothing is for a person to decide. Raises it for a missing or other base as well.
    """
    path = Path(path)
    exact = folder_step(path) is not None
    # only rank 0 looks, so that all ranks go through the same folders
    candidates = gather(on_all_ranks(gather, lambda: checkpoints_at(path) if rank == 0 else []))[0]
    reasons = []
    for folder in candidates:
        problem = next(find_damage(folder, rank=rank, world_size=world_size), None)
        problems = [text for text in gather(problem) if text]
        if not problems:
            _check_base(folder, report, rank=rank, world_size=world_size, gather=gather)
            return folder
        reasons.append(f"{folder.name}: {problems[0]}")
        if rank == 0 and not exact:
            report(f"checkpoint {folder.name} is not valid and is skipped: {problems[0]}")
    if exact:
        raise CheckpointError(f"{path} is not a valid checkpoint: {problems[0]}")
    if reasons:
        raise CheckpointError(
            f"no valid checkpoint in {path}: {'; '.join(reasons)}; move them away to start from the beginning"
        )
    return None


def _check_base(folder: Path, report: Callable[[str], None], **ranks: Any) -> None:
    """Raise CheckpointError unless what a checkpoint's adapters were trained on is there, and valid."""
    base = on_all_ranks(ranks["gather"], lambda: base_of(folder))
    if base is not None:
        on_all_ranks(ranks["gather"], lambda: base.check(folder))
        find_checkpoint(base.folder, report, **ranks)


def require_checkpoint(
    path: Path,
    report: Callable[[str], None] = print,
    *,
    setting: str = "",
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = alone,
) -> Path:
    """What `find_checkpoint` finds. Raises CheckpointError when there is none.

    setting: that names the path, to be told with the mistake.
    """
    checkpoint = find_checkpoint(path, report, rank=rank, world_size=world_size, gather=gather)
    if checkpoint is not None:
        return checkpoint
    raise no_checkpoint(path, f"{setting}: " if setting else "")


def no_checkpoint(path: Path, where: str = "") -> CheckpointError:
    """What to raise where there is none."""
    if (Path(path) / "config.json").exists():
        return CheckpointError(
            f"{where}{path} is a Hugging Face folder: make a checkpoint of it first, with "
            "tools/convert_from_hf.py"
        )
    return CheckpointError(f"{where}no checkpoint in {path}: expected {PLACES}")


def newest_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint at `path`, valid or not: no file is read. None when there is none."""
    return next(iter(checkpoints_at(path)), None)


def checkpoints_at(path: Path) -> list[Path]:
    """Folders of steps at `path`, valid or not, newest first. CheckpointError for one that is not there."""
    path = Path(path)
    if folder_step(path) is None:
        return list(reversed((step_folders(path) or step_folders(path / "checkpoints")).values()))
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    return [path]


# What is in it


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration of the run that wrote the checkpoint."""
    return load_run(str(Path(checkpoint) / CONFIG))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was given to `save_checkpoint` as `state`."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def read_tensor(checkpoint: Path, kind: str, name: str) -> torch.Tensor:
    """One full logical float32 tensor. To read many, use one `TensorReader`."""
    return TensorReader(checkpoint).read(kind, name)


def load_pieces(
    checkpoint: Path,
    pieces: Sequence[Piece],
    *,
    rank: int = 0,
    gather: Gather | None = None,
    ignore_other_kinds: bool = False,
    open_reader: Callable[[Path], "TensorReader"] | None = None,
) -> None:
    """Fill the live tensors of all pieces, owned or not, bit for bit, whatever layout wrote the checkpoint.

    rank:   whose file to open first; in an unchanged layout nearly everything is in it.
    gather: with it, all ranks call this together, an error on one is an error on all, and a tensor of the
        checkpoint that no rank asks for is an error too.
    ignore_other_kinds: only the kinds that are asked for must fit, others stay where they are: a start from
        the weights of another run.
    open_reader: what reads the checkpoint, if not a plain `TensorReader`: `open_weights` merges adapters.

    Raises CheckpointError when a tensor is missing or has another shape, or when the kinds of state are other
    ones (another optimizer's); then nothing has been written.
    The bytes are not verified again: `find_checkpoint` did that.
    """
    everywhere = gather or alone
    reader = on_all_ranks(everywhere, lambda: (open_reader or TensorReader)(checkpoint))
    asked = set().union(*everywhere({(piece.kind, piece.name) for piece in pieces}))
    reader.check_kinds({kind for kind, _ in asked}, exactly=gather is not None and not ignore_other_kinds)
    on_all_ranks(everywhere, lambda: reader.check(pieces))
    if gather is not None:
        reader.check_all_used(asked)  # the same on all ranks
    on_all_ranks(everywhere, lambda: reader.fill(pieces, first_rank=rank))


class TensorReader:
    """Reads logical tensors out of one checkpoint; each file is opened once, when needed, and kept.

    manifest: what the checkpoint holds, if not what its own says.
    shapes: the full shape of each tensor, by (kind, name).
    """

    def __init__(self, checkpoint: Path, manifest: Manifest | None = None) -> None:
        self.checkpoint = Path(checkpoint)
        self.manifest = manifest or read_manifest(self.checkpoint)
        self.shapes: dict[tuple[str, str], Shape] = {
            (entry.kind, entry.name): entry.full_shape for entry in self.manifest.tensors
        }
        self._tables: dict[str, dict[tuple[str, str], list[PieceRow]]] = {}
        self._sources: dict[str, TensorFile] = {}

    def read(self, kind: str, name: str) -> torch.Tensor:
        """One full logical float32 tensor."""
        shape = self._shape(kind, name)
        return self.read_box(kind, name, (0,) * len(shape), shape)

    def read_box(
        self, kind: str, name: str, start: Shape, shape: Shape, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The box [start, start + shape) of a logical tensor, float32; what lies around it is not read.

        dtype: to round to; then the box may lie in the mapped file, to be used and not to be kept.
        """
        if dtype:
            mapped = self._mapped(kind, name, Region(start, shape, 0, math.prod(shape)))
            if mapped is not None:
                return mapped.reshape(shape).to(dtype)
        box = torch.empty(shape, dtype=dtype or WIDEST_DTYPE)
        self.fill([Piece(name, kind, self._shape(kind, name), start, shape, 0, box.view(-1))])
        return box

    def _mapped(self, kind: str, name: str, region: Region) -> torch.Tensor | None:
        """A region where it lies, in its own dtype, if one piece is just that."""
        for file in self._nearest_files(0):
            for row in self._table(file).get((kind, name), ()):
                if row.region == region:
                    return _stored(self._source(file), row)
        return None

    def check(self, pieces: Iterable[Piece]) -> None:
        """Raise CheckpointError unless the checkpoint has each piece's tensor in the piece's full shape."""
        for piece in pieces:
            stored = self._shape(piece.kind, piece.name)
            if stored != tuple(piece.full_shape):
                raise CheckpointError(
                    f"{piece.kind} {piece.name} has shape {list(stored)} in {self.checkpoint} and "
                    f"{list(piece.full_shape)} in this model: use the model settings of its config.yaml"
                )

    def check_kinds(self, asked: set[str], *, exactly: bool) -> None:
        """Raise CheckpointError unless the checkpoint has these kinds of state, and `exactly` these."""
        stored = {kind for kind, _ in self.shapes}
        if not asked <= stored or (exactly and asked != stored):
            there, here = (", ".join(sorted(kinds)) or "nothing" for kinds in (stored, asked))
            raise CheckpointError(
                f"{self.checkpoint} holds {there} per tensor and this run has {here}: keep the optimizer and "
                "the model that wrote it, or start another run with output_dir=..."
            )

    def check_all_used(self, asked: set[tuple[str, str]]) -> None:
        """Raise CheckpointError when the checkpoint has more tensors of the kinds that are asked for."""
        kinds = {kind for kind, _ in asked}
        unused = sorted(pair for pair in self.shapes.keys() - asked if pair[0] in kinds)
        if unused:
            raise CheckpointError(
                f"{self.checkpoint} has {len(unused)} tensors that this model has not, {' '.join(unused[0])} "
                "for one: use the model settings of its config.yaml"
            )

    def fill(self, pieces: Sequence[Piece], *, first_rank: int = 0) -> None:
        """Copy every overlap into the live tensors; the files nearest to `first_rank`'s come first."""
        self.check(pieces)
        missing = {i: piece.tensor.numel() for i, piece in enumerate(pieces) if piece.tensor.numel()}
        for file in self._nearest_files(first_rank):
            if not missing:
                return
            wanted = [(i, piece) for i, piece in enumerate(pieces) if i in missing]
            for i, num_filled in self._fill_from(file, wanted):
                missing[i] -= num_filled
                if not missing[i]:
                    del missing[i]
        if missing:
            i, num_elements = next(iter(missing.items()))
            what = f"{pieces[i].kind} {pieces[i].name}"
            raise CheckpointError(f"{what}: {num_elements} elements of a piece are not in {self.checkpoint}")

    @torch.no_grad()
    def _fill_from(self, file: str, wanted: list[tuple[int, Piece]]) -> Iterable[tuple[int, int]]:
        """(index, elements filled) for each wanted piece that this file has a part of."""
        table = self._table(file)
        found = [(i, p, table[p.kind, p.name]) for i, p in wanted if (p.kind, p.name) in table]
        if not found:
            return
        for i, piece, rows in found:
            yield i, sum(_copy(self._source(file), row, piece) for row in rows)

    def stored_bytes(self) -> dict[tuple[str, str], dict[torch.dtype, int]]:
        """How many bytes of each tensor are in the files, by the dtype that they have there."""
        found: dict[tuple[str, str], dict[torch.dtype, int]] = {}
        for file in self._nearest_files(0):
            table, source = self._table(file), TensorFile(self.checkpoint / file)
            for key, rows in table.items():
                sizes = found.setdefault(key, {})
                for tensor in (_stored(source, row) for row in rows):
                    sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return found

    def let_go(self) -> None:
        """Close the files: what was read of them no longer counts as memory of the process."""
        self._sources.clear()

    def _source(self, file: str) -> Mapping[str, torch.Tensor]:
        if file not in self._sources:
            self._sources[file] = TensorFile(self.checkpoint / file)
        return self._sources[file]

    def _shape(self, kind: str, name: str) -> Shape:
        try:
            return self.shapes[kind, name]
        except KeyError:
            raise CheckpointError(f"{self.checkpoint} has no {kind} {name}") from None

    def _nearest_files(self, rank: int) -> list[str]:
        ranks = sorted(range(self.manifest.world_size), key=lambda other: abs(other - rank))
        return [name for name in map(rank_file, ranks) if name in self.manifest.files]

    def _table(self, file: str) -> dict[tuple[str, str], list[PieceRow]]:
        if file not in self._tables:
            table: dict[tuple[str, str], list[PieceRow]] = {}
            for row in read_piece_table(self.checkpoint / file):
                table.setdefault((row.kind, row.name), []).append(row)
            self._tables[file] = table
        return self._tables[file]


def read_piece_table(path: Path) -> list[PieceRow]:
    """The pieces in a rank's file. Raises CheckpointError when the file is not one, or is cut off."""
    try:
        rows = json.loads(TensorFile(path).metadata["pieces"])
        table = [
            PieceRow(key, kind, name, tuple(shape), Region(tuple(start), tuple(box), flat_start, size))
            for key, kind, name, shape, (start, box, flat_start, size) in rows
        ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    for row in table:
        check_region(row.region, row.full_shape, f"{path.name}: {row.kind} {row.name}")
    return table


def _stored(source: Mapping[str, torch.Tensor], row: PieceRow) -> torch.Tensor:
    """The flat tensor of a row. Raises CheckpointError where the file's header and its table disagree."""
    flat = source.get(row.key)
    if flat is None or flat.numel() != row.region.size:
        found = "nothing" if flat is None else f"shape {list(flat.shape)}"
        raise CheckpointError(
            f"{row.kind} {row.name}: {row.key} has {row.region.size} elements by its file's table, and by "
            f"its header {found}: the file is damaged"
        )
    return flat.reshape(-1)


def _copy(source: Mapping[str, torch.Tensor], row: PieceRow, piece: Piece) -> int:
    """Copy what a file's tensor and a live piece have in common; the number of elements."""
    pairs = overlaps(row.region, piece.region)
    if not pairs:
        return 0
    flat = _stored(source, row)
    return sum(_view(piece.tensor, here).copy_(_view(flat, there)).numel() for there, here in pairs)


def _view(flat: torch.Tensor, window: Window) -> torch.Tensor:
    return flat[window.start : window.stop].view(window.shape)[window.cut]
