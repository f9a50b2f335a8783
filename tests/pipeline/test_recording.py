"""A recorded walk holds each action of the schedule once, where and when it was done."""

import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from megalite.batch import Batch
from megalite.measure.recorder import HostClock, Recorder
from megalite.pipeline.actions import AnyBackward, BackwardInput, Compute, Forward, Transfer
from megalite.pipeline.orders import RULES
from megalite.pipeline.p2p import Peers
from megalite.pipeline.runner import PipelineRunner
from megalite.pipeline.schedule import build_schedule, orders_of, placement_of
from megalite.pipeline.timeline import Interval, idle, mean_durations, play, replay
from tests.harness import run_distributed

RANKS, MICRO_BATCHES, SHAPE = 3, 5, (4, 1, 8)
SLEEP_SECONDS = 0.002


class SleepingStage:
    """Chunks that add one, and take a while for it."""

    def __init__(self, rank, placement):
        self.rank, self.placement = rank, placement

    def forward(self, x, batch, chunk):
        time.sleep(SLEEP_SECONDS)
        x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
        is_last = self.placement.stage(self.rank, chunk) == self.placement.num_stages - 1
        return (x + 1).sum() if is_last else x + 1

    def backward(self, output, grad, chunk, *, is_last):
        time.sleep(2 * SLEEP_SECONDS)
        output.backward(grad)

    def backward_input(self, output, grad, chunk):
        time.sleep(SLEEP_SECONDS)
        output.backward(grad)

    def backward_weight(self, left, *, is_last):
        time.sleep(SLEEP_SECONDS)


def recorded(rank):
    """By schedule: what was noted, and the begin and end of the walk."""
    found = {}
    for name in RULES:
        placement = placement_of(name, RANKS)
        head_rank, head_chunk = placement.holder(placement.num_stages - 1)
        peers = Peers(dist.group.WORLD, SHAPE, torch.float32, torch.device("cpu"))
        loss_chunk = head_chunk if rank == head_rank else None
        runner = PipelineRunner(SleepingStage(rank, placement), peers, loss_chunk=loss_chunk)
        actions = build_schedule(name, rank, RANKS, MICRO_BATCHES)
        batches = [Batch(torch.zeros(1, 1, dtype=torch.int64))] * MICRO_BATCHES
        recorder = Recorder(HostClock())
        began = time.perf_counter()
        runner.train(actions, batches, torch.tensor(1.0), recorder)
        found[name] = recorder.noted(), began, time.perf_counter()
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(recorded, RANKS)


def in_lane(noted, lane):
    return [note for note in noted if note.lane == lane]


def as_ordered(action):
    return replace(action, is_last=False) if isinstance(action, AnyBackward) else action


@pytest.mark.parametrize("name", RULES)
def test_every_action_of_the_schedule_is_recorded_once_in_its_order(ranks, name):
    for rank, found in enumerate(ranks):
        noted, schedule = found[name][0], build_schedule(name, rank, RANKS, MICRO_BATCHES)
        for lane, kind in {"compute": Compute, "post": Transfer}.items():
            assert [note.what for note in in_lane(noted, lane)] == [
                action for action in schedule if isinstance(action, kind)
            ]
        transfers = [action for action in schedule if isinstance(action, Transfer)]
        waits = in_lane(noted, "wait")
        assert len(waits) == 1 + sum(action.verb == "receive" for action in transfers)
        assert waits[-1].what is None  # for what was sent


@pytest.mark.parametrize("name", RULES)
def test_a_rank_does_one_thing_at_a_time_within_the_step(ranks, name):
    for found in ranks:
        noted, began, ended = found[name]
        assert all(note.begin_seconds <= note.end_seconds for note in noted)
        assert began <= noted[0].begin_seconds and noted[-1].end_seconds <= ended
        assert all(a.end_seconds <= b.begin_seconds for a, b in pairwise(noted))
        for note in in_lane(noted, "compute"):
            whole = SLEEP_SECONDS * (2 if type(note.what).__name__ == "Backward" else 1)
            assert note.end_seconds - note.begin_seconds >= whole


@pytest.mark.parametrize("name", RULES)
def test_each_send_meets_a_receive_that_is_not_there_before_it_was_sent(ranks, name):
    sent, received, arrived = defaultdict(list), defaultdict(list), {}
    for rank, found in enumerate(ranks):
        for note in in_lane(found[name][0], "post"):
            action = note.what
            ends = (rank, action.peer) if action.verb == "send" else (action.peer, rank)
            (sent if action.verb == "send" else received)[ends].append((note, rank))
        for note in in_lane(found[name][0], "wait")[:-1]:
            kind = "activation" if isinstance(note.what, Forward) else "gradient"
            arrived[rank, kind, note.what.micro_batch, note.what.chunk] = note.end_seconds
    assert sent.keys() == received.keys() and sent
    for ends in sent:
        for (send, _), (receive, rank) in zip(sent[ends], received[ends], strict=True):
            facts = (receive.what.kind, receive.what.micro_batch)
            assert (send.what.kind, send.what.micro_batch) == facts
            assert send.begin_seconds < arrived[rank, *facts, receive.what.chunk]


def intervals_of(ranks, name):
    return [
        Interval(note.begin_seconds, note.end_seconds, rank, as_ordered(note.what))
        for rank, found in enumerate(ranks)
        for note in in_lane(found[name][0], "compute")
    ]


@pytest.mark.parametrize("name", RULES)
def test_a_replay_waits_no_longer_than_the_ranks_did_and_keeps_what_each_computation_took(ranks, name):
    orders, placement = orders_of(name, RANKS, MICRO_BATCHES)
    measured = intervals_of(ranks, name)
    first = min(interval.start for interval in measured)
    measured = [i._replace(start=i.start - first, end=i.end - first) for i in measured]
    replayed = replay(measured, orders, placement)
    for before, after in zip(measured, replayed, strict=True):
        assert before.action == after.action and before.rank == after.rank
        assert before.end - before.start == pytest.approx(after.end - after.start)
    for rank in range(RANKS):
        assert idle(replayed, rank) <= idle(measured, rank) + 1e-9


@pytest.mark.parametrize("name", RULES)
def test_mean_durations_are_those_that_a_plan_was_made_of(name):
    orders, placement = orders_of(name, RANKS, MICRO_BATCHES)
    intervals = play(orders, placement)
    durations = mean_durations(intervals, placement.num_chunks)
    parts = (durations.forward, durations.backward_input, durations.backward_weight)
    assert parts == pytest.approx((1, 1, 1))
    assert any(isinstance(i.action, BackwardInput) for i in intervals) == RULES[name].splits_backward
