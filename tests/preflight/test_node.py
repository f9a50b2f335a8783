"""One node: what is said of its device, folder and code; one wrong element of a product is seen."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalite.preflight import device as device_module
from megalite.preflight.device import draw_factors, ecc_of, ecc_problem, measure_product, memory_problem
from megalite.preflight.folder import Token
from megalite.preflight.inventory import hash_of_code

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_exact_in_every_format(monkeypatch, dtype):
    monkeypatch.setattr(device_module, "TIMED_SECONDS", 0.0)
    product = measure_product(CPU, dtype)
    assert product.is_right and product.flops_per_second > 0


def test_one_wrong_bit_in_any_product_is_seen(monkeypatch):
    monkeypatch.setattr(device_module, "TIMED_SECONDS", 0.0)
    calls = []

    def flip_in_the_last(left, right):
        calls.append(0)
        product = left @ right
        if len(calls) == 1 + device_module.LEAST_TIMED:
            product[200, 100] += 1
        return product

    assert not measure_product(CPU, torch.float32, flip_in_the_last).is_right


def test_no_sum_can_exceed_what_bf16_counts_exactly():
    left, right, vector = draw_factors(1024)
    longest = left.abs().sum(dim=1).max() * right.abs().max()
    assert 100 < longest <= 256  # with 8 bits of significand 257 is the first whole number that is missing
    assert float(torch.tensor(257.0, dtype=torch.bfloat16)) != 257
    assert vector.min() > 0


def test_memory_that_others_hold_is_told():
    assert memory_problem(79 * 10**9, 80 * 10**9) is None
    told = memory_problem(12 * 10**9, 80 * 10**9)
    assert told == "12.0 of 80.0 GB are free: another process holds the rest"


@pytest.mark.parametrize(
    ("answer", "is_sound"), [("0\n", True), ("[N/A]\n", True), ("", True), ("3\n", False)]
)
def test_counts_of_memory_errors(answer, is_sound):
    assert (ecc_of(answer) is None) == is_sound


def test_nvidia_smi_is_asked_about_this_rank_s_gpu(monkeypatch, tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-77*) echo 4;; *) echo 0;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for uuid, count in (("77", 4), ("78", 0)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid)
        )
        told = ecc_problem(CPU)
        assert told is None if count == 0 else told is not None and told.startswith("4 memory errors")


def test_a_folder_whose_token_has_other_content_is_another_folder(tmp_path: Path):
    token = Token.leave(str(tmp_path))
    assert token.problem(0.1) is None
    token.path.write_text("another job's")
    assert token.problem(0.1) == "what rank 0 wrote there has other content"


def test_the_hash_of_code_sees_names_and_contents(tmp_path: Path):
    hashes = []
    for name, text in (("a.py", "1"), ("b.py", "1"), ("b.py", "2"), ("c.txt", "1")):
        folder = tmp_path / f"{len(hashes)}"
        folder.mkdir()
        (folder / "x.py").touch()
        (folder / name).write_text(text)
        hashes.append(hash_of_code(folder))
    assert len(set(hashes)) == 4
