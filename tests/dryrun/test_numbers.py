"""What a dry run counts, against counts by hand: bytes on links, and memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megalite.dryrun.links import traffic_of
from megalite.dryrun.log import Call, Exchange, Passage
from megalite.dryrun.memory import LiveBytes
from megalite.dryrun.roster import Roster
from megalite.dryrun.walk import Walk, walk
from megalite.model.flops import num_parameters
from tests.dryrun.jobs import job_of
from tests.trainers import MODEL, SEQ_LENGTH, Case

RANKS = (0, 1, 2, 3)
IDS_BYTES = 2 * 8 * SEQ_LENGTH  # with labels, of a micro batch of one sample: all are there from the start
ROSTER = Roster([{"g": RANKS}] * 4, [()] * 4, [0] * 4)


@pytest.mark.parametrize(
    ("kind", "of_each", "in_node", "between"),
    [
        # In a ring over two nodes of two, 0 and 2 send to their neighbours, 1 and 3 to the other node.
        ("all_gather", 750, {0: 750, 2: 750}, {1: 750, 3: 750}),
        ("reduce_scatter", 750, {0: 750, 2: 750}, {1: 750, 3: 750}),
        ("all_reduce", 1500, {0: 1500, 2: 1500}, {1: 1500, 3: 1500}),
        # A quarter to each of three others, of whom one is on the same node.
        ("all_to_all", 750, dict.fromkeys(RANKS, 250), dict.fromkeys(RANKS, 500)),
    ],
)
def test_bytes_of_a_collective_are_told_by_link(kind, of_each, in_node, between):
    log = (Call("g", kind, 1000, ""),)
    over = traffic_of([log] * 4, ROSTER, gpus_per_node=2)["g"]
    assert dict(over.in_node_bytes) == in_node and dict(over.between_nodes_bytes) == between
    assert in_node.get(0, 0) + between.get(0, 0) == of_each
    assert (over.num_members, over.num_entries) == (4, 1)


def test_bytes_of_a_transfer_leave_its_sender():
    send = (Exchange((Passage("send", "g", 1, 64, "x"),), ""),)
    receive = (Exchange((Passage("receive", "g", 3, 64, "x"),), ""),)
    over = traffic_of([(), send, receive, ()], ROSTER, gpus_per_node=2)["g"]
    assert dict(over.between_nodes_bytes) == {1: 64} and not over.in_node_bytes
    over = traffic_of([send, receive, (), ()], ROSTER, gpus_per_node=2)["g"]
    assert dict(over.in_node_bytes) == {0: 64} and not over.between_nodes_bytes


def test_the_peak_is_of_what_lives_at_a_time():
    device = torch.device("meta")
    with FakeTensorMode(), LiveBytes(device, lambda: "here") as memory:
        x = torch.empty(1000, device=device)  # 4,000 bytes
        y = x + 1
        view = y.view(10, 100)  # no memory of its own
        del y
        z = view.sum(1)  # 40 bytes more
        assert memory.now == 4000 + 4000 + 40
        del view, z
        w = x.to(torch.bfloat16)  # 2,000
        assert (memory.now, memory.peak, memory.peak_place) == (6000, 8040, "here")
        torch.empty(5000)  # on the host
        assert memory.now == 6000
        del w, x
    assert memory.now == 0


def walked(case: Case, rank: int = 0) -> Walk:
    job = job_of(case, num_micro_batches=2)
    return walk(job.run, job.deepspeed, rank, job.world_size)


def test_weights_and_what_adam_keeps_are_the_model_s():
    padded = 128 - MODEL.vocab_size  # rows of both tables
    parameters = num_parameters(MODEL) + 2 * padded * MODEL.hidden_size
    whole = walked(Case(dp=2, precision="bf16"))
    assert whole.weight_bytes == 2 * parameters
    assert whole.state_bytes == {
        "fp32 masters": 4 * parameters / 2,
        "optimizer state": 8 * parameters / 2,
        "summed gradients, fp32": 4 * parameters / 2,
        "partitions of weights": 2 * parameters / 2,
    }
    unpartitioned = walked(Case(dp=2, zero=0))
    assert unpartitioned.weight_bytes == 4 * parameters
    assert unpartitioned.state_bytes["optimizer state"] == 8 * parameters


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_and_afab_all():
    """Narayanan 2021, arXiv 2104.04473, section 2.2: what lives beside weights and gradients, at the peak."""

    def activations(schedule: str, num_micro_batches: int) -> int:
        job = job_of(Case(pp=2, schedule=schedule))
        sizes = {"train_batch_size": num_micro_batches, "train_micro_batch_size_per_gpu": 1}
        first = walk(job.run, job.deepspeed.model_copy(update=sizes), 0, 2)
        return first.peak_bytes - first.weight_bytes

    few, many = activations("1f1b", 4), activations("1f1b", 8)
    assert many - few == 4 * IDS_BYTES
    more, most = activations("afab", 4), activations("afab", 8)
    assert more > few and most - more > 4 * IDS_BYTES + few


def test_recomputed_blocks_keep_less():
    kept, recomputed = (walked(Case(recompute=how)) for how in ("none", "full"))
    assert recomputed.peak_bytes < kept.peak_bytes
    assert recomputed.log == kept.log  # one rank says nothing, but for sums over the world
