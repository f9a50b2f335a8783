"""Write a checkpoint that is complete or does not exist.

    1. every rank writes the pieces it owns into step-XXXXXXXX.tmp, and syncs its file
    2. rank 0 reads the piece tables back, and checks that each element of each tensor is there exactly once
    3. rank 0 writes the manifest, syncs the folder, renames it to step-XXXXXXXX, and syncs the parent
    4. rank 0 removes checkpoints that its retention does not keep

All ranks agree on whether it went well: an error on one rank (a full disk) is an error on all of them, and no
rank is left waiting.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megalite.checkpoint.agreement import Gather, on_all_ranks
from megalite.checkpoint.damage import TENSORS
from megalite.checkpoint.format import (
    MANIFEST,
    STATE,
    VALIDATION_LOSS,
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
from megalite.checkpoint.publication import (
    aside_of_step,
    create_aside,
    nothing_left_on_error,
    publish,
    remove,
)
from megalite.checkpoint.reshard import check_coverage
from megalite.checkpoint.retention import KEEP_ALL, Retention
from megalite.checkpoint.tensor_file import DTYPE_NAMES, Entry, write_tensor_file, write_text_file


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
    retention: Retention = KEEP_ALL,
    base: Path | None = None,
) -> Path:
    """Write RUN_DIR/checkpoints/step-XXXXXXXX; called by all ranks together. The folder's path.

    root:      RUN_DIR/checkpoints, on a file system that all ranks share.
    pieces:    this rank's; those with `owned` are written.
    state:     JSON-able; rank 0's is written as state.json.
    files:     further text files by name (config.yaml, deepspeed.json); rank 0's are written.
    gather:    all-gathers a Python object over the ranks, in rank order; for one process `lambda x: [x]`.
    retention: which checkpoints stay, besides this one.
    base:      what adapters are trained on, which is kept in any case.

    A checkpoint that already exists for this step is replaced. Raises CheckpointError on every rank, naming
    the failing one, when something cannot be written or the pieces do not cover each tensor exactly once; any
    other error as itself on the rank where it happened.
    """
    folder = step_folder(root, step)
    aside = aside_of_step(root, step)

    def finish(shares: list[Share]) -> None:
        entries = write_texts(aside, state, files) | files_of(shares)
        finish_checkpoint(
            aside, folder, Manifest(step=step, world_size=world_size, files=entries), unwritten_of(shares)
        )
        prune(root, step, retention, base)

    with nothing_left_on_error(aside, rank == 0, f"{folder.name} was not saved"):
        size_bytes = sum(gather(owned_bytes(pieces)))
        on_all_ranks(gather, lambda: create_aside(root, aside, size_bytes) if rank == 0 else None)
        shares = gather(on_all_ranks(gather, lambda: write_pieces(aside, pieces, rank)))
        on_all_ranks(gather, lambda: finish(shares) if rank == 0 else None)
    return folder


def owned_bytes(pieces: Sequence[Piece]) -> int:
    """Of what a rank writes."""
    return sum(piece.tensor.nbytes for piece in pieces if piece.owned)


class Share(NamedTuple):
    """What one rank wrote; `unwritten` are the tensors that it has a part of and leaves to other ranks."""

    file: FileEntry | None
    unwritten: set[tuple[str, str]]


def write_pieces(aside: Path, pieces: Sequence[Piece], rank: int) -> Share:
    """This rank's file, if it owns anything."""
    owned = [piece for piece in pieces if piece.owned and piece.tensor.numel()]
    unwritten = {(p.kind, p.name) for p in pieces} - {(p.kind, p.name) for p in owned}
    if not owned:
        return Share(None, unwritten)
    aside.mkdir(exist_ok=True)  # a network file system may not show rank 0's folder here yet
    table = [
        PieceRow(f"{p.kind}/{p.name}/{i}", p.kind, p.name, p.full_shape, p.region)
        for i, p in enumerate(owned)
    ]
    entries = [_entry(row, piece) for row, piece in zip(table, owned, strict=True)]
    file = write_tensor_file(aside / rank_file(rank), entries, {"pieces": json.dumps(table)})
    return Share(file, unwritten)


def _entry(row: PieceRow, piece: Piece) -> Entry:
    own = piece.tensor.dtype
    dtype = own if own in DTYPE_NAMES else WIDEST_DTYPE
    return Entry(row.key, (row.region.size,), dtype, piece.read or (lambda: piece.tensor))


def write_texts(aside: Path, state: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, FileEntry]:
    """The state and further files, by their names."""
    texts = {STATE: json.dumps(state, indent=1) + "\n", **files}
    return {name: write_text_file(aside / name, text) for name, text in texts.items()}


def files_of(shares: Sequence[Share]) -> dict[str, FileEntry]:
    """What the ranks wrote, by the files' names."""
    return {rank_file(rank): share.file for rank, share in enumerate(shares) if share.file}


def unwritten_of(shares: Sequence[Share]) -> set[tuple[str, str]]:
    """The tensors that any rank left to others."""
    return set().union(*(share.unwritten for share in shares))


def finish_checkpoint(
    aside: Path, folder: Path, files: Manifest, expected: Collection[tuple[str, str]] = ()
) -> None:
    """Index the files that are there, and publish them.

    files: the manifest, without its tensors.
    expected: tensors, by kind and name, that must be among them.
    """
    manifest = files.model_copy(update={"tensors": _index(aside, files.files, expected)})
    write_text_file(aside / MANIFEST, format_manifest(manifest))
    publish(aside, folder)


def _index(
    aside: Path, files: Mapping[str, FileEntry], expected: Collection[tuple[str, str]]
) -> list[TensorEntry]:
    """The tensors in the ranks' files, as read back from them and checked to be whole."""
    rows: list[PieceRow] = []
    for name, entry in files.items():
        rows += _read_back(aside / name, entry) if name.endswith(TENSORS) else []
    check_coverage(rows)
    shapes = {(row.kind, row.name): row.full_shape for row in rows}
    for kind, name in set(expected) - shapes.keys():
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


def prune(root: Path, step: int, retention: Retention, base: Path | None) -> None:
    """Remove what does not stay, up to this step; later ones, left by a rewound run, are not ours."""
    steps = [other for other in list_steps(root) if other <= step]
    superseded = retention.superseded(steps, lambda other: _validation_loss(step_folder(root, other)))
    remove(folder for old in superseded if not _is_base(folder := step_folder(root, old), base))


def _is_base(folder: Path, base: Path | None) -> bool:
    return base is not None and folder.resolve() == base.resolve()


def _validation_loss(folder: Path) -> float | None:
    """As its state says; None of a folder that is damaged, whose loss is nothing to keep it for."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8")).get(VALIDATION_LOSS)
    except (OSError, ValueError):
        return None
