"""What a process uses is measured, given back, and told by name."""

import subprocess
import sys

import psutil
import pytest
import torch

from megalite.measure import memory
from megalite.measure.allocator import mapped_block_mib
from megalite.measure.memory import SteadyPeak, begin_peak, node_bytes, peak_bytes, used_bytes
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
import ctypes, resource, sys, torch
from megalite.measure.allocator import settle_blocks
from megalite.measure.memory import used_bytes
assert settle_blocks(int(sys.argv[1]))
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is then of one page
torch.ones(64 << 18); start = used_bytes(torch.device("cpu"))
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2 << 18) for _ in range(100)]
    kept = torch.ones(100)
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print((used_bytes(torch.device("cpu")) - start) >> 20, faults[-1] * resource.getpagesize() >> 20)
"""


@pytest.mark.parametrize(("mib", "is_kept"), [(1, False), (0, True)])
def test_blocks_above_the_threshold_go_back_when_they_are_freed(mib, is_kept):
    """Of 200 MiB in blocks of 2; those that are kept come again without a fault for each page."""
    command = [sys.executable, "-c", FREED, str(mib)]
    out = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=120).stdout
    held, faulted_mib = map(int, out.split())
    assert (held > 20) == is_kept
    assert faulted_mib < 4 if is_kept else faulted_mib > 160


def test_blocks_are_kept_where_there_is_much_room():
    assert mapped_block_mib(None, planned_bytes=1000, node_bytes=4000) == 0
    assert mapped_block_mib(None, planned_bytes=1001, node_bytes=4000) == 4
    assert [mapped_block_mib(stated, 1, 10**9) for stated in (0, 7)] == [0, 7]


def test_a_control_group_limits_the_memory(monkeypatch, tmp_path):
    assert 0 < node_bytes() <= psutil.virtual_memory().total
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:cpu:/elsewhere\n0::/job/step\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{5 * MIB}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert node_bytes() == 5 * MIB
    older = tmp_path / "memory" / "slurm"
    older.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("4:memory:/slurm\n0::/job/step\n")
    (older / "memory.limit_in_bytes").write_text(f"{3 * MIB}\n")
    assert node_bytes() == 3 * MIB


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
    kept = describe_memory(ranks, keeps_blocks=True).splitlines()
    assert kept[:-1] == lines and "mapped_block_mib=4 takes less" in kept[-1]
    assert describe_plan(1, planned) == "memory   150 MiB planned for rank 1: weights 100, activations 50"
