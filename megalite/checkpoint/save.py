"""Write a checkpoint that is complete or does not exist.

    1. every rank writes the pieces it owns into step-XXXXXXXX.tmp, and syncs its file
    2. rank 0 reads the piece tables back, and checks that each element of each tensor is there exactly once
    3. rank 0 writes the manifest, syncs the folder, renames it to step-XXXXXXXX, and syncs the parent
    4. rank 0 removes checkpoints beyond `keep_last`

All ranks agree on whether it went well: an error on one rank (a full disk) is an error on all of them, and no
rank is left waiting.
"""

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megalite.checkpoint.agreement import Gather, on_all_ranks
from megalite.checkpoint.format import (
    MANIFEST,
    STATE,
    WIDEST_DTYPE,
    CheckpointError,
    FileEntry,
    Manifest,
    Piece,
    PieceRow,
    TensorEntry,
    format_manifest,
    list_steps,
    rank_file,
    step_folder,
)
from megalite.checkpoint.load import read_piece_table
from megalite.checkpoint.reshard import check_coverage
from megalite.checkpoint.tensor_file import DTYPE_NAMES, Entry, write_tensor_file, write_text_file
from megalite.files import ASIDE, sync_folder


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    files: Mapping[str, str],
    *,
    rank: int,
    world_size: int,
    gather: Gather,
    keep_last: int,
    base: Path | None = None,
) -> Path:
    """Write RUN_DIR/checkpoints/step-XXXXXXXX; called by all ranks together. The folder's path.

    root:      RUN_DIR/checkpoints, on a file system that all ranks share.
    pieces:    this rank's; those with `owned` are written.
    state:     JSON-able; rank 0's is written as state.json.
    files:     further text files by name (config.yaml, deepspeed.json); rank 0's are written.
    gather:    all-gathers a Python object over the ranks, in rank order; for one process `lambda x: [x]`.
    keep_last: checkpoints to keep, this one included; 0 keeps all.
    base:      what adapters are trained on, which is kept in any case.

    A checkpoint that already exists for this step is replaced. Raises CheckpointError on every rank, naming
    the failing one, when something cannot be written or the pieces do not cover each tensor exactly once; any
    other error as itself on the rank where it happened.
    """
    folder = step_folder(root, step)
    aside = folder.with_name(folder.name + ASIDE)

    def finish(shares: list[_Share]) -> None:
        tensors = _index(aside, shares)
        entries = _write_texts(aside, state, files)
        entries |= {rank_file(i): share.file for i, share in enumerate(shares) if share.file}
        manifest = Manifest(step=step, world_size=world_size, files=entries, tensors=tensors)
        _publish(aside, folder, manifest)
        _prune(root, step, keep_last, base)

    with _nothing_left_on_error(folder, aside, rank):
        on_all_ranks(gather, lambda: _create(root, aside) if rank == 0 else None)
        shares = gather(on_all_ranks(gather, lambda: _write_pieces(aside, pieces, rank)))
        on_all_ranks(gather, lambda: finish(shares) if rank == 0 else None)
    return folder


@contextmanager
def _nothing_left_on_error(folder: Path, aside: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder.name} was not saved: {error}") from error


def _create(root: Path, aside: Path) -> None:
    """A fresh folder to write into. Whatever an interrupted save or removal left behind goes first."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"step-*{ASIDE}"):
        shutil.rmtree(stale, ignore_errors=True)
    aside.mkdir()


class _Share(NamedTuple):
    """What one rank wrote; `unwritten` are the tensors that it has a part of and leaves to other ranks."""

    file: FileEntry | None
    unwritten: set[tuple[str, str]]


def _write_pieces(aside: Path, pieces: Sequence[Piece], rank: int) -> _Share:
    """This rank's file, if it owns anything."""
    owned = [piece for piece in pieces if piece.owned and piece.tensor.numel()]
    unwritten = {(p.kind, p.name) for p in pieces} - {(p.kind, p.name) for p in owned}
    if not owned:
        return _Share(None, unwritten)
    aside.mkdir(exist_ok=True)  # a network file system may not show rank 0's folder here yet
    table = [
        PieceRow(f"{p.kind}/{p.name}/{i}", p.kind, p.name, p.full_shape, p.region)
        for i, p in enumerate(owned)
    ]
    entries = [_entry(row, piece) for row, piece in zip(table, owned, strict=True)]
    file = write_tensor_file(aside / rank_file(rank), entries, {"pieces": json.dumps(table)})
    return _Share(file, unwritten)


def _entry(row: PieceRow, piece: Piece) -> Entry:
    own = piece.tensor.dtype
    dtype = own if own in DTYPE_NAMES else WIDEST_DTYPE
    return Entry(row.key, (row.region.size,), dtype, piece.read or (lambda: piece.tensor))


def _write_texts(aside: Path, state: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, FileEntry]:
    texts = {STATE: json.dumps(state, indent=1) + "\n", **files}
    return {name: write_text_file(aside / name, text) for name, text in texts.items()}


def _index(aside: Path, shares: Sequence[_Share]) -> list[TensorEntry]:
    """The tensors in the ranks' files, as read back from them and checked to be whole."""
    rows: list[PieceRow] = []
    for rank, share in enumerate(shares):
        rows += _read_back(aside / rank_file(rank), share.file) if share.file else []
    check_coverage(rows)
    shapes = {(row.kind, row.name): row.full_shape for row in rows}
    for kind, name in set().union(*(share.unwritten for share in shares)) - shapes.keys():
        raise CheckpointError(f"{kind} {name}: no rank owns a piece of it")
    return [
        TensorEntry(kind=kind, name=name, full_shape=shape, num_elements=math.prod(shape))
        for (kind, name), shape in sorted(shapes.items())
    ]


def _read_back(path: Path, entry: FileEntry) -> list[PieceRow]:
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        raise CheckpointError(
            f"rank 0 does not see {path}: output_dir must be on storage that all ranks share"
        )
    return read_piece_table(path)


def _publish(aside: Path, folder: Path, manifest: Manifest) -> None:
    write_text_file(aside / MANIFEST, format_manifest(manifest))
    sync_folder(aside)
    replaced = _bury(folder) if folder.exists() else None
    aside.rename(folder)
    sync_folder(folder.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def _prune(root: Path, step: int, keep_last: int, base: Path | None) -> None:
    """Remove the oldest checkpoints up to this step; later ones, left by a rewound run, are not ours."""
    if not keep_last:
        return
    for old in [other for other in list_steps(root) if other <= step][:-keep_last]:
        if base is not None and step_folder(root, old).resolve() == base.resolve():
            continue
        try:
            shutil.rmtree(_bury(step_folder(root, old)))
        except OSError as error:
            warnings.warn(f"the old checkpoint of step {old} was not removed: {error}", stacklevel=2)


def _bury(folder: Path) -> Path:
    """Take a checkpoint's name away before its files go: half removed, it must not look damaged."""
    return folder.rename(folder.with_name(f"{folder.name}.old{ASIDE}"))
