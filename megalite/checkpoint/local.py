"""Checkpoints on the nodes' own disks, a share on each, and from there in the shared folder.

    1. every rank writes the pieces it owns on its node, and syncs its file
    2. each node publishes what it has, with an index of the files of all nodes, and keeps no other step
    3. the files are copied beside the shared checkpoints, each by a rank whose node has it, and synced
    4. rank 0 checks and publishes them there, as it does what was written there at once

From step 2 on the checkpoint is whole for as long as every file is on a node of the job, whichever it is: a
run that begins again carries it first, and reads what is shared. All ranks agree on each of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megalite.checkpoint.agreement import Gather, on_all_ranks
from megalite.checkpoint.damage import damage_of
from megalite.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    FileEntry,
    Manifest,
    Piece,
    format_manifest,
    list_steps,
    rank_file,
    read_manifest_as,
    step_folder,
)
from megalite.checkpoint.publication import (
    aside_of_step,
    create_aside,
    nothing_left_on_error,
    publish,
    remove,
)
from megalite.checkpoint.retention import KEEP_ALL, Retention
from megalite.checkpoint.save import (
    Share,
    files_of,
    finish_checkpoint,
    owned_bytes,
    prune,
    unwritten_of,
    write_pieces,
    write_texts,
)
from megalite.checkpoint.tensor_file import copy_file, write_text_file

LOCAL_REMEDY = (
    "free some, or use another checkpoint.local_dir; it holds one checkpoint, and the next one beside it"
)


class LocalDiskError(CheckpointError):
    """A checkpoint cannot be written on the nodes."""


class NodeManifest(Manifest):
    """What a node says of a checkpoint whose files are on several.

    files: of all nodes. nodes: where each was written. unwritten: tensors that a rank left to others.
    """

    nodes: dict[str, str]
    unwritten: list[tuple[str, str]]


@dataclass(frozen=True)
class NodeDisk:
    """The disk of a rank's node, and who else is there.

    root: the folder of the run's checkpoints on it; it is this node's alone.
    nodes: the node of each rank.
    """

    root: Path
    nodes: tuple[str, ...]
    rank: int

    @property
    def node(self) -> str:
        return self.nodes[self.rank]

    @property
    def ranks(self) -> list[int]:
        """Those of this node, ascending; the first leads."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.node]

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]


def save_locally(
    disk: NodeDisk,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    files: Mapping[str, str],
    *,
    gather: Gather,
) -> Path:
    """Write a step's checkpoint on the nodes, with what `save_checkpoint` takes; collective.

    Raises LocalDiskError on every rank; then no node has it. Whether the pieces cover each tensor is looked
    at when it is carried. The folder on this node.
    """
    folder, aside = step_folder(disk.root, step), aside_of_step(disk.root, step)

    def write() -> tuple[Share, dict[str, FileEntry]]:
        share = write_pieces(aside, pieces, disk.rank)
        return share, write_texts(aside, state, files) if disk.rank == 0 else {}

    def finish() -> None:
        texts, shares = written[0][1], [share for share, _ in written]
        nodes = {rank_file(rank): node for rank, node in enumerate(disk.nodes)}
        manifest = NodeManifest(
            step=step,
            world_size=len(disk.nodes),
            files=texts | files_of(shares),
            nodes={**dict.fromkeys(texts, disk.nodes[0]), **nodes},
            unwritten=sorted(unwritten_of(shares)),
        )
        write_text_file(aside / MANIFEST, format_manifest(manifest))
        publish(aside, folder)

    try:
        with nothing_left_on_error(aside, disk.leads, f"{folder.name} was not saved on the nodes"):
            sizes = gather(owned_bytes(pieces))
            size_bytes = sum(sizes[rank] for rank in disk.ranks)
            _on_leaders(disk, gather, lambda: create_aside(disk.root, aside, size_bytes, LOCAL_REMEDY))
            written = gather(on_all_ranks(gather, write))
            _on_leaders(disk, gather, finish)
    except CheckpointError as error:
        if disk.leads and folder.exists():  # another node has no share of it
            remove([folder])
        raise LocalDiskError(str(error)) from error
    _on_leaders(disk, gather, lambda: _keep_only(disk.root, step))
    return folder


def _on_leaders(disk: NodeDisk, gather: Gather, action: Callable[[], object]) -> None:
    on_all_ranks(gather, lambda: action() if disk.leads else None)


def _keep_only(root: Path, step: int) -> None:
    """Later ones go too: where a node was lost they are of a course that was left."""
    remove(step_folder(root, other) for other in list_steps(root) if other != step)


class Freight(NamedTuple):
    """A checkpoint whose files are all on nodes of this job, and those that this rank carries."""

    manifest: NodeManifest
    mine: list[str]


def find_freight(disk: NodeDisk, step: int, *, gather: Gather) -> Freight:
    """What there is of a step on the nodes. CheckpointError on all ranks, where a file is missing.

    Names and sizes are looked at, and no checksums.
    """
    found = gather(_look(step_folder(disk.root, step)) if disk.leads else None)
    holders = {rank: held for rank, held in enumerate(found) if held is not None}
    manifest = next((held.manifest for held in holders.values() if held.manifest), None)
    if manifest is None:
        reasons = [held.reason for held in holders.values()]
        raise CheckpointError(next(iter(reasons), f"no node has step {step}"))
    mine = []
    for number, (name, entry) in enumerate(manifest.files.items()):
        leader = next((r for r, held in holders.items() if held.sizes.get(name) == entry.size_bytes), None)
        if leader is None:
            here = ", ".join(dict.fromkeys(disk.nodes))
            why = "".join(f" ({held.reason})" for held in holders.values() if held.reason)
            raise CheckpointError(f"{name} was written on {manifest.nodes[name]} and is not on {here}{why}")
        ranks = [rank for rank, node in enumerate(disk.nodes) if node == disk.nodes[leader]]
        if ranks[number % len(ranks)] == disk.rank:
            mine.append(name)
    return Freight(manifest, mine)


class _Held(NamedTuple):
    """What a node has of a step: an index, or why not, and the sizes of files in bytes."""

    manifest: NodeManifest | None
    reason: str
    sizes: dict[str, int]


def _look(folder: Path) -> _Held | None:
    if not folder.exists():
        return None
    try:
        manifest = read_manifest_as(NodeManifest, folder)
        return _Held(manifest, "", {path.name: path.stat().st_size for path in folder.iterdir()})
    except (CheckpointError, OSError) as error:
        return _Held(None, str(error), {})


def carry(
    disk: NodeDisk,
    freight: Freight,
    root: Path,
    *,
    gather: Gather,
    retention: Retention = KEEP_ALL,
    base: Path | None = None,
) -> Path:
    """Copy a checkpoint of the nodes to the shared RUN_DIR/checkpoints; collective. Its folder there.

    Raises CheckpointError on every rank, as `save_checkpoint` does; the nodes keep what they have.
    """
    manifest, step = freight.manifest, freight.manifest.step
    source, folder, aside = step_folder(disk.root, step), step_folder(root, step), aside_of_step(root, step)

    def copy() -> None:
        if freight.mine:
            aside.mkdir(exist_ok=True)  # a network file system may not show rank 0's folder here yet
        for name in freight.mine:
            if copy_file(source / name, aside / name) != manifest.files[name]:
                raise CheckpointError(f"{source / name} is not what was written there")

    def finish() -> None:
        files = Manifest(step=step, world_size=manifest.world_size, files=manifest.files)
        finish_checkpoint(aside, folder, files, manifest.unwritten)
        prune(root, step, retention, base)

    with nothing_left_on_error(aside, disk.rank == 0, f"{folder.name} was not carried from the nodes"):
        size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
        on_all_ranks(gather, lambda: create_aside(root, aside, size_bytes) if disk.rank == 0 else None)
        on_all_ranks(gather, copy)
        on_all_ranks(gather, lambda: finish() if disk.rank == 0 else None)
    return folder


def bring(
    disk: NodeDisk, steps: range, root: Path, report: Callable[[str], None], **options: Any
) -> Path | None:
    """Carry the newest checkpoint of the nodes, among these steps, that is whole; None if there is none.

    report: gets a line for each that is not. options: as of `carry`. A whole one that cannot be carried is
    for a person: CheckpointError.
    """
    gather: Gather = options["gather"]
    held = gather(list_steps(disk.root) if disk.leads else [])
    for step in sorted({step for of_node in held for step in of_node if step in steps}, reverse=True):
        try:
            freight = find_freight(disk, step, gather=gather)
            _verify(disk, freight, gather)
        except CheckpointError as error:
            report(f"checkpoint step-{step:08d} on the nodes is not whole and is skipped: {error}")
            continue
        return carry(disk, freight, root, **options)
    return None


def _verify(disk: NodeDisk, freight: Freight, gather: Gather) -> None:
    folder, files = step_folder(disk.root, freight.manifest.step), freight.manifest.files
    damage = (text for name in freight.mine for text in damage_of(folder / name, files[name]))
    for node, problem in zip(disk.nodes, gather(next(damage, None)), strict=True):
        if problem:
            raise CheckpointError(f"on {node}, {problem}")
