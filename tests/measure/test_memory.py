"""What a process uses is measured, given back, and told by name."""

import subprocess
import sys

import pytest
import torch

from megalite.measure import memory
from megalite.measure.memory import SteadyPeak, begin_peak, peak_bytes, used_bytes
from megalite.measure.memory_table import RankMemory, describe_memory, describe_plan

CPU = torch.device("cpu")
MIB = 1 << 20


def test_a_peak_is_seen_and_begins_again():
    begin_peak(CPU)
    before = peak_bytes(CPU)
    block = torch.ones(100 * MIB // 4)
    assert peak_bytes(CPU) - before > 90 * MIB
    del block
    begin_peak(CPU)
    assert peak_bytes(CPU) - used_bytes(CPU) < 20 * MIB


def test_the_first_step_has_no_part_in_the_peak(monkeypatch):
    begun = []
    monkeypatch.setattr(memory, "begin_peak", begun.append)
    peak = SteadyPeak(CPU)
    for step in (7, 7, None, 8, 8, 9):
        peak.reached(step)
        if step == 7:
            assert begun == []
    assert begun == [CPU]


FREED = """
import sys, torch
from megalite.measure.allocator import give_back, map_large_blocks
from megalite.measure.memory import used_bytes
assert map_large_blocks(int(sys.argv[1]))
torch.ones(64 << 18); start = used_bytes(torch.device("cpu"))
blocks = [torch.ones(2 << 18) for _ in range(100)]
kept = [torch.ones(100) for _ in range(1)]
del blocks
print((used_bytes(torch.device("cpu")) - start) >> 20)
"""


@pytest.mark.parametrize(("threshold_bytes", "is_kept"), [(1 << 20, False), (32 << 20, True)])
def test_blocks_above_the_threshold_go_back_when_they_are_freed(threshold_bytes, is_kept):
    command = [sys.executable, "-c", FREED, str(threshold_bytes)]
    out = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=120).stdout
    assert (int(out) > 20) == is_kept


def test_the_table_is_of_the_rank_that_took_most():
    planned = {"weights": 100 * MIB, "activations": 50 * MIB}
    ranks = [RankMemory(r, planned, {"weights": 100 * MIB}, 300 * MIB, (140 + r) * MIB) for r in range(2)]
    lines = describe_memory(ranks).splitlines()
    assert lines[0].split() == ["memory", "of", "rank", "1,", "MiB", "planned", "measured"]
    assert [line.split() for line in lines[1:4]] == [
        ["weights", "100", "100"],
        ["activations", "50"],
        ["in", "all,", "at", "the", "peak", "150", "141"],
    ]
    assert describe_plan(1, planned) == "memory   150 MiB planned for rank 1: weights 100, activations 50"
