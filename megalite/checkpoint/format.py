"""What a checkpoint is on disk: its folder, its pieces and its manifest. No tensor bytes are read here.

    RUN_DIR/checkpoints/step-00000100/
        manifest.json            every file's size and sha256, every tensor's shape; written last
        state.json               step, consumed samples: whatever the trainer hands over
        config.yaml, deepspeed.json
        rank-00000.safetensors   the pieces that rank 0 owned, as flat tensors, and a table of them

The content does not depend on the layout that wrote it: a tensor is stored under its full logical name and
shape, in pieces that say which box of the full tensor they lie in and which flat range of that box they are.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalite.error import UserError
from megalite.parallel.shard import ShardSpec

FORMAT_VERSION = 1
WIDEST_DTYPE = torch.float32  # of what is stored
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
REPLACED = ".replaced"  # suffix of a checkpoint whose step is saved again, until that has the name
VALIDATION_LOSS = "validation_loss"  # in the state: of the very step, where it was measured

Shape = tuple[int, ...]


class CheckpointError(UserError):
    """A checkpoint cannot be written, is damaged, or does not fit the model: one line, for people."""


class Region(NamedTuple):
    """Elements [start, start + size) of a box of a full tensor, counted in the box's row-major order."""

    box_start: Shape
    box_shape: Shape
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of one logical tensor in this rank's memory.

    The rank holds the box `box_start`, `box_shape` of the full tensor (its tensor-parallel share, without
    padding); `tensor` is the flat range of that box which begins at `flat_start` (its data-parallel share).

    kind:   "weight" (in the highest precision that there is), "buffer" (state that is no parameter), or the
        optimizer's name for something that it keeps per element.
    tensor: 1-D floats of at most 32 bits, on any device. float32, bfloat16 and float16 are stored as they
        are, others as float32, which is exact. A live view: loading writes into it, and rounds to its dtype
        (a rank's bfloat16 copy of its weights).
    read:   gives the numbers when they are to be written; then `tensor` may be on the device "meta".
    owned:  this rank writes it. Over all ranks, each element of each (kind, name) is owned exactly once.

    Raises CheckpointError for integers and wider floats.
    """

    name: str
    kind: str
    full_shape: Shape
    box_start: Shape
    box_shape: Shape
    flat_start: int
    tensor: torch.Tensor
    owned: bool = True
    read: Callable[[], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        dtype, what = self.tensor.dtype, f"{self.kind} {self.name}"
        if not dtype.is_floating_point or dtype.itemsize > WIDEST_DTYPE.itemsize:
            raise CheckpointError(
                f"{what}: {dtype} does not fit into {WIDEST_DTYPE}, the widest that is stored: "
                "let the trainer's state hold it"
            )
        if self.tensor.ndim != 1:
            raise CheckpointError(f"{what}: a piece is 1-D, not {tuple(self.tensor.shape)}")
        check_region(self.region, self.full_shape, what)

    @classmethod
    def of(
        cls, spec: ShardSpec, kind: str, tensor: torch.Tensor, *, flat_start: int = 0, owned: bool = True
    ) -> "Piece":
        """The piece of a flat range of what a rank holds by a spec, without the padding in it.

        Rows of padding are the last ones of a rank, so what counts is the front of the flat tensor.
        """
        size = math.prod(spec.box_shape)
        return cls(
            name=spec.name,
            kind=kind,
            full_shape=spec.full_shape,
            box_start=spec.box_start,
            box_shape=spec.box_shape,
            flat_start=min(flat_start, size),
            tensor=tensor[: max(0, size - flat_start)],
            owned=owned,
        )

    @torch.no_grad()
    def copy_from(self, full: torch.Tensor) -> None:
        """Take its elements from the full tensor."""
        box = full[tuple(slice(s, s + n) for s, n in zip(self.box_start, self.box_shape, strict=True))]
        self.tensor.copy_(box.reshape(-1)[self.flat_start :][: self.tensor.numel()])

    @property
    def region(self) -> Region:
        """Where in the full tensor it lies."""
        return Region(tuple(self.box_start), tuple(self.box_shape), self.flat_start, self.tensor.numel())


class PieceRow(NamedTuple):
    """A row of a file's table: its tensor `key` holds this region of a logical tensor."""

    key: str
    kind: str
    name: str
    full_shape: Shape
    region: Region


def check_region(region: Region, full_shape: Shape, what: str) -> None:
    """Raise CheckpointError when the region leaves its box, or the box leaves the full tensor."""
    start, shape = region.box_start, region.box_shape
    inside = len(start) == len(shape) == len(full_shape) and all(
        min(first, length) >= 0 and first + length <= full
        for first, length, full in zip(start, shape, full_shape, strict=True)
    )
    if not inside:
        raise CheckpointError(f"{what}: box {list(start)} + {list(shape)} is not inside {list(full_shape)}")
    stop = region.start + region.size
    if region.start < 0 or stop > math.prod(shape):
        raise CheckpointError(
            f"{what}: flat range {region.start}:{stop} is not inside its box of {math.prod(shape)} elements"
        )


# Names


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint in RUN_DIR/checkpoints."""
    return root / f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """Name of the file with the pieces that a rank owned."""
    return f"rank-{rank:05d}.safetensors"


def folder_step(folder: Path) -> int | None:
    """The step that a folder is named after; None for any other name (an incomplete one, for example)."""
    match = re.fullmatch(r"step-(\d{8,})", folder.name.removesuffix(REPLACED))
    return int(match[1]) if match else None


def list_steps(root: Path) -> list[int]:
    """The steps that have a folder under `root`, ascending; whether they are valid is not looked at."""
    return [step for step, folder in step_folders(root).items() if not folder.name.endswith(REPLACED)]


def step_folders(root: Path) -> dict[int, Path]:
    """The folder of each step that has one under `root`, ascending; whether they are valid is not looked at.

    Where a save that replaces a step was interrupted between two names, it is the one that was to go.
    """
    if not root.is_dir():
        return {}
    folders = sorted((folder for folder in root.iterdir() if folder.is_dir()), reverse=True)
    found = {folder_step(folder): folder for folder in folders}  # a plain name is the last of its step
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


# Manifest


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    size_bytes: int = Field(ge=0)
    sha256: str


class TensorEntry(_Record):
    kind: str
    name: str
    full_shape: Shape
    num_elements: int


class Manifest(_Record):
    """The index of a checkpoint. It is complete when every file here exists with its size and checksum."""

    format_version: int = FORMAT_VERSION
    step: int = Field(description="optimizer steps taken")
    world_size: int = Field(description="ranks that wrote it")
    files: dict[str, FileEntry]
    tensors: list[TensorEntry] = []

    def shapes(self, kind: str) -> dict[str, Shape]:
        """The full shape of every tensor of a kind, by name."""
        return {entry.name: entry.full_shape for entry in self.tensors if entry.kind == kind}


AnyManifest = TypeVar("AnyManifest", bound=Manifest)


def format_manifest(manifest: Manifest) -> str:
    """JSON text that carries its own checksum, so that damage to the index shows as well."""
    body = manifest.model_dump(mode="json")
    return json.dumps({"sha256": _digest(body), **body}, indent=1)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises CheckpointError with the reason when the manifest is missing, damaged or of another version."""
    return read_manifest_as(Manifest, checkpoint)


def read_manifest_as(kind: type[AnyManifest], checkpoint: Path) -> AnyManifest:
    """The same, of a kind that has more to say."""
    path = checkpoint / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        version, digest = body["format_version"], body.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this megalite reads {FORMAT_VERSION}")
    if digest != _digest(body):
        raise CheckpointError(f"{path} does not match its own sha256: it is damaged")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a manifest: {error.errors()[0]['msg']}") from None


def _digest(body: dict) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
