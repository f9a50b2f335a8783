"""Safetensors files that are written as a stream, and read without staying in memory."""

import hashlib
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megalite.checkpoint import tensor_file
from megalite.checkpoint.stream import MAX_BLOCKS
from megalite.checkpoint.tensor_file import Entry, TensorFile, hash_file, write_tensor_file


def entries_of(tensors):
    return [Entry(name, t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()]


def test_tensors_of_several_widths_lie_aligned_and_come_back(tmp_path):
    tensors = {"odd": torch.randn(3).bfloat16(), "wide": torch.randn(2, 5), "half": torch.randn(4).half()}
    write_tensor_file(tmp_path / "file", entries_of(tensors), {})
    with safe_open(tmp_path / "file", framework="pt") as file:
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.equal(tensor)
            assert found.data_ptr() % tensor.itemsize == 0


def test_tensors_of_many_blocks_strided_or_empty_come_back_with_their_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)
    tensors = {
        "long": torch.randn(100, 7),  # not whole blocks
        "turned": torch.randn(9, 5).T,
        "strided": torch.randn(40)[::2].bfloat16(),
        "one": torch.randn(4)[1:2].as_strided((1,), (7,)),
        "none": torch.randn(0),
        "scalar": torch.tensor(2.5),
    }
    entry = write_tensor_file(tmp_path / "file", entries_of(tensors), {"a": "b"})
    data = (tmp_path / "file").read_bytes()
    assert (entry.size_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    file = TensorFile(tmp_path / "file")
    assert file.keys() == tensors.keys() and file.metadata == {"a": "b"}
    assert all(file[name].equal(tensor) for name, tensor in tensors.items())
    with pytest.raises(KeyError):
        file["absent"]


@pytest.mark.parametrize("size", [0, 1, 64, 64 * MAX_BLOCKS * 3 + 5])
def test_a_file_is_hashed_though_its_buffers_are_filled_again(tmp_path, monkeypatch, size):
    class Slow:
        """A digest that looks at a block late."""

        def __init__(self):
            self.digest = hashlib.sha256()

        def update(self, block):
            time.sleep(0.001)
            self.digest.update(block)

        def hexdigest(self):
            return self.digest.hexdigest()

    data = bytes(i * i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tensor_file, "hashlib", type("", (), {"sha256": Slow}))
    assert hash_file(tmp_path / "file") == expected


def resident_bytes(path: Path) -> int:
    """Memory of this process that is of a mapped file (Linux)."""
    smaps = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf"{re.escape(str(path))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", smaps)
    return 1024 * sum(map(int, sizes))


def test_what_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "LET_GO_BYTES", 1 << 20)
    path, num_bytes = tmp_path / "file", 0
    save_file({str(i): torch.full((1 << 17,), float(i)) for i in range(32)}, path)  # half a MiB each
    file, kept, most = TensorFile(path), {}, 0
    for name in file:
        tensor = file[name]
        assert tensor.eq(float(name)).all()
        num_bytes += tensor.nbytes
        kept |= {name: tensor} if name in ("3", "17") else {}
        most = max(most, resident_bytes(path))
    assert num_bytes == 16 << 20
    assert 1 << 19 <= most < 8 << 20  # three tensors, and the maps of the two that are in use
    assert len(kept) == 2 and all(tensor.eq(float(name)).all() for name, tensor in kept.items())
