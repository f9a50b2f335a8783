"""Tensor-parallel ranks touch as much of the memory that they share as is planned.

The exchanges of a layer are made by themselves, with slots of a quarter of their size.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite.config.data import DataConfig
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.parallel import reach, slots
from megalite.parallel.mappings import start_all_gather, start_all_reduce, start_reduce_scatter, wait_for
from megalite.parallel.node_memory import share_memory
from megalite.parallel.slots import SLOTS
from megalite.plan.memory import SHARED, plan_memory
from tests.harness import run_distributed
from tests.trainers import MODEL, Case, deepspeed_of, run_config

UNIT = 2**18
AROUND = 2**16  # bytes that the system maps around a page that is read
SIZES = {  # units of a micro batch's activations, ranks, pieces of rows
    "all fits": (4, 4, 1),
    "what is summed is too large": (24, 4, 1),
    "what is summed fits in pieces": (24, 4, 2),
    "pieces alone fit": (128, 4, 8),
    "two ranks": (8, 2, 1),
    "two ranks, pieces alone": (64, 2, 4),
    "nothing fits": (128, 4, 1),
    "whole sequences": (4, 4, 0),
    "whole sequences, too large": (20, 4, 0),
}


def planned(units: int, ranks: int, pieces: int) -> int:
    case = Case(tp=ranks, sp=pieces > 0, row_chunks=max(pieces, 1), zero=1)
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 2**20}
    data = DataConfig(seq_length=units * UNIT // 4096)
    run: RunConfig = run_config(case, model=MODEL.model_copy(update=sizes), data=data)
    deepspeed: DeepSpeedConfig = deepspeed_of(case, 8)  # of one sample
    return plan_memory(run, deepspeed, ranks, 0)[SHARED]


def touched(rank: int, units: int, ranks: int, pieces: int) -> int:
    """After what a layer exchanges, in every slot."""
    group = dist.new_group(range(ranks))
    share_memory([group])
    before = shared_bytes()
    x = torch.zeros(ranks, units * UNIT // 4 // ranks)
    for _ in range(2 * SLOTS):
        if pieces:
            wait_for(start_all_gather(x[rank], group)[1])
        else:
            wait_for(start_all_reduce(x, group)[1])
    for _ in range(2 * SLOTS):
        if pieces:
            wait_for(start_reduce_scatter(x, group)[1])
    for start in (start_reduce_scatter, start_all_gather):
        for piece in list(x.chunk(max(pieces, 1), dim=1)) * 2 * SLOTS if pieces else ():
            said = piece if start is start_reduce_scatter else piece[rank]
            wait_for(start(said.contiguous(), group)[1])
    return shared_bytes() - before


def shared_bytes() -> int:
    """Of memory that processes share, what this one has touched; no allocator knows of it."""
    found = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize("name", SIZES)
def test_what_is_touched_is_planned(name, monkeypatch):
    """At the most: of four ranks, what one says to all and to another may lie in one place."""
    for place in (slots, reach):
        monkeypatch.setattr(place, "SLOT_BYTES", 16 * UNIT)
    plan = planned(*SIZES[name])
    most = max(run_distributed(touched, SIZES[name][1], *SIZES[name]))
    assert most - 2 * AROUND * SLOTS * SIZES[name][1] <= plan <= 1.2 * most
    assert (plan == 0) == (name in {"nothing fits", "whole sequences, too large"})
