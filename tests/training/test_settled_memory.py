"""Before a trainer is made a process learns where freed blocks go, by its plan and the node's memory."""

import pytest
import torch

from megalite.config.memory import MemoryConfig
from megalite.parallel.topology import Topology
from megalite.plan.memory import plan_memory
from megalite.training import memory
from megalite.training.memory import settle_memory
from tests.trainers import Case, deepspeed_config, run_config

CASE = Case(dp=2)


class Context:
    """As much of one as is asked for."""

    topology, rank = Topology(2), 1

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def settled(monkeypatch, device: str = "cpu", **options) -> tuple[list[int], bool]:
    """What the C library is told, and whether blocks are said to be kept."""
    found: list[int] = []
    monkeypatch.setattr(memory, "settle_blocks", lambda mib: not found.append(mib))
    run = run_config(CASE, memory=MemoryConfig(**options))
    return found, settle_memory(run, deepspeed_config(CASE), Context(device), local_world_size=2)


@pytest.mark.parametrize(("room", "mib"), [(4.0, 0), (3.99, 4)])
def test_what_all_ranks_of_a_node_need_is_compared_with_its_memory(monkeypatch, room, mib):
    """But for what ranks share, of which no allocator leaves room between blocks."""
    plan = plan_memory(run_config(CASE), deepspeed_config(CASE), 2, 1)
    planned = 2 * (sum(plan.values()) - plan["shared memory"])
    assert plan["shared memory"] > 0
    monkeypatch.setattr(memory, "node_bytes", lambda: room * planned)
    assert settled(monkeypatch) == ([mib], mib == 0)
    assert settled(monkeypatch, mapped_block_mib=7) == ([7], False)


def test_on_a_gpu_nothing_is_settled(monkeypatch):
    assert settled(monkeypatch, device="cuda") == ([], False)
