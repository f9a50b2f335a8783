"""Safetensors files that are written as a stream."""

import torch
from safetensors import safe_open

from megalite.checkpoint.tensor_file import Entry, write_tensor_file


def test_tensors_of_several_widths_lie_aligned_and_come_back(tmp_path):
    tensors = {"odd": torch.randn(3).bfloat16(), "wide": torch.randn(2, 5), "half": torch.randn(4).half()}
    entries = [Entry(name, t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()]
    write_tensor_file(tmp_path / "file", entries, {})
    with safe_open(tmp_path / "file", framework="pt") as file:
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.equal(tensor)
            assert found.data_ptr() % tensor.itemsize == 0
