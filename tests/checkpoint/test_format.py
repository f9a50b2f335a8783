"""The format of version 1, written by hand from docs/checkpoint_format.md: none of our code writes here.

It is pinned in both directions: what was written once is read for ever, and what is written now is the same.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalite.checkpoint.format import Piece
from megalite.checkpoint.load import TensorReader, find_checkpoint, load_pieces, read_state
from tests.checkpoint.worlds import alone, save_world

WEIGHT = torch.arange(20, dtype=torch.float32).reshape(4, 5) / 7
TENSORS = {("weight", "w"): WEIGHT, ("exp_avg", "w"): -WEIGHT, ("exp_avg_sq", "w"): WEIGHT**2}
# Two columns on rank 0; of the other three, rank 1 has the first seven elements and rank 2 the rest.
RANKS = [((0, 0), (4, 2), 0, 8), ((0, 2), (4, 3), 0, 7), ((0, 2), (4, 3), 7, 5)]
Region = tuple[tuple[int, int], tuple[int, int], int, int]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(full: torch.Tensor, region: Region) -> torch.Tensor:
    (row, column), (rows, columns), start, size = region
    box = full[row : row + rows, column : column + columns]
    return box.reshape(-1)[start : start + size].clone()


def write_rank(path: Path, region: Region) -> None:
    names = [(f"{kind}/{name}/{i}", kind, name) for i, (kind, name) in enumerate(TENSORS)]
    table = [[key, kind, name, [4, 5], region] for key, kind, name in names]
    parts = {key: part(TENSORS[kind, name], region) for key, kind, name in names}
    save_file(parts, path, {"pieces": json.dumps(table)})


def write_by_hand(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for rank, region in enumerate(RANKS):
        write_rank(folder / f"rank-{rank:05d}.safetensors", region)
    (folder / "state.json").write_text('{"step": 7}')
    (folder / "config.yaml").write_text("seed: 1\n")
    files = {
        path.name: {
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
    }
    tensors = [
        {"kind": kind, "name": name, "full_shape": [4, 5], "num_elements": 20} for kind, name in TENSORS
    ]
    body: dict[str, Any] = {"format_version": 1, "step": 7, "world_size": 3}
    body |= {"files": files, "tensors": tensors}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    manifest = {"sha256": sha256(text.encode()), **body}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def piece(kind: str, name: str, region: Region, tensor: torch.Tensor) -> Piece:
    box_start, box_shape, start, _ = region
    return Piece(name, kind, (4, 5), box_start, box_shape, start, tensor)


def contents(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """(rows, tensors as lists) of a rank's file."""
    with safe_open(path, framework="pt") as file:
        table = json.loads(file.metadata()["pieces"])
    return table, {key: tensor.tolist() for key, tensor in load_file(path).items()}


def test_a_checkpoint_of_version_1_is_read_to_the_last_bit(tmp_path):
    folder = write_by_hand(tmp_path / "step-00000007")
    assert find_checkpoint(tmp_path, report=pytest.fail) == folder
    assert read_state(folder) == {"step": 7}
    reader = TensorReader(folder)
    assert all(reader.read(kind, name).equal(full) for (kind, name), full in TENSORS.items())


def test_a_checkpoint_of_version_1_fills_the_pieces_of_other_ranks(tmp_path):
    folder = write_by_hand(tmp_path / "step-00000007")
    region = ((1, 0), (3, 5), 2, 11)  # rows from the second on, from their third element
    pieces = [piece(*pair, region, torch.zeros(11)) for pair in TENSORS]
    load_pieces(folder, pieces, gather=alone)
    assert all(p.tensor.equal(part(TENSORS[p.kind, p.name], region)) for p in pieces)


def test_what_is_written_now_is_version_1(tmp_path):
    by_hand = write_by_hand(tmp_path / "hand" / "step-00000007")
    ranks = [[piece(*pair, r, part(TENSORS[pair], r)) for pair in TENSORS] for r in RANKS]
    ours = save_world(tmp_path / "ours", 7, ranks, {"step": 7}, {"config.yaml": "seed: 1\n"})
    for rank in range(3):
        name = f"rank-{rank:05d}.safetensors"
        assert contents(ours / name) == contents(by_hand / name)
    manifest, expected = (json.loads((f / "manifest.json").read_text()) for f in (ours, by_hand))
    assert manifest.keys() == expected.keys()
    assert manifest["files"].keys() == expected["files"].keys()
    for key in ("format_version", "step", "world_size"):
        assert manifest[key] == expected[key]
    assert sorted(manifest["tensors"], key=str) == sorted(expected["tensors"], key=str)
