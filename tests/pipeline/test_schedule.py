"""Every schedule for up to 8 ranks and 16 micro batches, without a process.

Each property is a check that raises `BrokenError`. The same checks are run on schedules broken on purpose: a
check that does not notice is no check. What ranks compute is compared with torch's own pipelining, list by
list.
"""

from collections import defaultdict
from dataclasses import replace

import pytest
from torch.distributed.pipelining import schedules as peer

from megalite.pipeline.actions import (
    AnyBackward,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Handover,
    Transfer,
)
from megalite.pipeline.orders import RULES
from megalite.pipeline.placement import Placement
from megalite.pipeline.schedule import (
    build_schedule,
    forward_only,
    orders_of,
    placement_of,
    with_last_backward,
)
from megalite.pipeline.transfers import with_transfers

TRAINING = [*((name, None) for name in RULES), ("interleaved", 3)]  # name, chunks
EVALUATION = ["forwards", "forwards in chunks", "forwards in a V"]
LETTERS = {Forward: "F", Backward: "B", BackwardInput: "I", BackwardWeight: "W"}


class BrokenError(Exception):
    """A schedule lacks a property."""


def require(holds, message):
    if not holds:
        raise BrokenError(message)


# The checks. A schedule of the whole pipeline is a list of action lists, one per rank.


def check_computation(actions, num_chunks, num_micro_batches, trains):
    """Each chunk takes each micro batch forward once, then backward once if the schedule trains, in order."""
    every = list(range(num_micro_batches))
    for chunk in range(num_chunks):
        mine = [action for action in actions if type(action) in LETTERS and action.chunk == chunk]
        word = "".join(LETTERS[type(action)] for action in mine if action.micro_batch == 0)
        require(word in (("FB", "FIW") if trains else ("F",)), f"chunk {chunk} does {word}")
        for letter in word:
            order = [action.micro_batch for action in mine if LETTERS[type(action)] == letter]
            require(order == every, f"chunk {chunk} does {letter} of {order}")
        for micro_batch in every:
            done = "".join(LETTERS[type(action)] for action in mine if action.micro_batch == micro_batch)
            require(done == word, f"chunk {chunk} does {done} for micro batch {micro_batch}")
    marks = [action.is_last for action in actions if isinstance(action, AnyBackward)]
    require(marks == [False] * (len(marks) - 1) + [True] * bool(marks), f"the last backward by {marks}")


def check_data_flow(actions, rank, placement):
    """What a computation needs has arrived, what leaves has been computed, and all results leave, once."""
    here, made, left = set(), set(), []
    last = placement.num_stages - 1
    for action in actions:
        match action:
            case Forward(micro_batch, chunk):
                first = placement.stage(rank, chunk) == 0
                require(first or ("activation", micro_batch, chunk) in here, f"{action} lacks its input")
                made.add(("activation", micro_batch, chunk))
            case Backward(micro_batch, chunk) | BackwardInput(micro_batch, chunk):
                ends = placement.stage(rank, chunk) == last
                require(ends or ("gradient", micro_batch, chunk) in here, f"{action} lacks its gradient")
                made.add(("gradient", micro_batch, chunk))
            case Transfer("receive", kind, micro_batch, _, chunk):
                here.add((kind, micro_batch, chunk))
            case Transfer("send", kind, micro_batch, _, chunk) | Handover(kind, micro_batch, chunk):
                require((kind, micro_batch, chunk) in made, f"{action} comes too early")
                left.append((kind, micro_batch, chunk))
                if isinstance(action, Handover):
                    here.add((kind, micro_batch, action.target))
    ends = {"activation": last, "gradient": 0}
    expected = sorted(what for what in made if placement.stage(rank, what[2]) != ends[what[0]])
    require(sorted(left) == expected, f"of {expected} leave {sorted(left)}")


def check_order(schedules, placement):
    """What one rank sends another comes out there in the same order, at the stage that is next."""
    for sender in range(len(schedules)):
        for receiver in range(len(schedules)):
            sent = traffic(schedules, placement, "send", sender, receiver)
            received = traffic(schedules, placement, "receive", receiver, sender)
            require(sent == received, f"send {sent} meets receive {received}")


def traffic(schedules, placement, verb, rank, peer_rank):
    """(kind, micro batch, stage that takes it) of a rank's transfers with another."""
    found = []
    for action in schedules[rank]:
        if isinstance(action, Transfer) and (action.verb, action.peer) == (verb, peer_rank):
            stage = placement.stage(rank, action.chunk)
            step = 0 if verb == "receive" else 1 if action.kind == "activation" else -1
            found.append((action.kind, action.micro_batch, stage + step))
    return found


def check_rendezvous(schedules):
    """Nothing is buffered, as if a rank waited for each transfer where it posts it; all lists end.

    NCCL asks no more: it has one queue of transfers per rank, in the order in which they were posted.
    """
    queues = [[action for action in actions if isinstance(action, Transfer)] for actions in schedules]

    def meet(rank):
        """Let the first transfer of a rank's queue happen, if its peer has come to it."""
        if not queues[rank]:
            return False
        mine = queues[rank][0]
        theirs = queues[mine.peer][0] if queues[mine.peer] else None
        expected = ("receive" if mine.verb == "send" else "send", mine.kind, mine.micro_batch, rank)
        if theirs is None or (theirs.verb, theirs.kind, theirs.micro_batch, theirs.peer) != expected:
            return False
        queues[rank].pop(0)
        queues[mine.peer].pop(0)
        return True

    while any(meet(rank) for rank in range(len(queues))):
        pass
    require(not any(queues), f"deadlock: ranks wait for {[queue[:1] for queue in queues]}")


def check_in_flight(actions, limit):
    """At most `limit` activations of chunks are between their forward and the end of their backward."""
    in_flight = 0
    for action in actions:
        in_flight += isinstance(action, Forward) - isinstance(action, Backward | BackwardWeight)
        require(in_flight <= limit, f"{in_flight} in flight, at most {limit} allowed")


# The properties, for all small cases.


def pipeline(name, num_ranks, num_micro_batches, num_chunks=None):
    """Every rank's list, and the placement."""
    if name in EVALUATION:
        placement = Placement(num_ranks, 2 if "in" in name else 1, "V" in name)
        return [forward_only(r, placement, num_micro_batches) for r in range(num_ranks)], placement
    orders, placement = orders_of(name, num_ranks, num_micro_batches, num_chunks)
    return [with_last_backward(actions) for actions in with_transfers(orders, placement)], placement


def pipelines(schedule, num_ranks):
    for num_micro_batches in range(1, 17):
        yield num_micro_batches, *pipeline(schedule[0], num_ranks, num_micro_batches, schedule[1])


ALL = [*TRAINING, *((name, None) for name in EVALUATION)]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=lambda pair: "-".join(map(str, pair)))
every_size = pytest.mark.parametrize("num_ranks", range(1, 9))


@every_schedule
@every_size
def test_computations_are_complete_what_they_need_is_there_and_every_send_meets_its_receive(
    schedule, num_ranks
):
    for num_micro_batches, schedules, placement in pipelines(schedule, num_ranks):
        for rank, actions in enumerate(schedules):
            trains = schedule[0] in RULES
            check_computation(actions, placement.num_chunks, num_micro_batches, trains)
            check_data_flow(actions, rank, placement)
        check_order(schedules, placement)
        check_rendezvous(schedules)


def test_a_rank_is_built_as_all_together_are():
    for name, num_chunks in TRAINING:
        together, _ = pipeline(name, 4, 6, num_chunks)
        assert [build_schedule(name, rank, 4, 6, num_chunks) for rank in range(4)] == together


@every_size
def test_1f1b_keeps_at_most_as_many_micro_batches_as_ranks_remain(num_ranks):
    for num_micro_batches, schedules, _ in pipelines(("1f1b", None), num_ranks):
        for rank, actions in enumerate(schedules):
            check_in_flight(actions, min(num_ranks - rank, num_micro_batches))


@every_size
@pytest.mark.parametrize(("name", "halves"), [("zb-h1", 1), ("zbv", 2)])
def test_without_waiting_no_rank_keeps_more_than_the_first_of_1f1b(num_ranks, name, halves):
    for num_micro_batches, schedules, _ in pipelines((name, None), num_ranks):
        for actions in schedules:
            check_in_flight(actions, halves * min(num_ranks, num_micro_batches))


def test_interleaved_keeps_what_narayanan_counts():
    """For p = 4, m = 8, v = 2: 11, 9, 7 and 5 halves."""
    schedules, _ = pipeline("interleaved", 4, 8)
    for limit, actions in zip((11, 9, 7, 5), schedules, strict=True):
        check_in_flight(actions, limit)
        with pytest.raises(BrokenError, match="in flight"):
            check_in_flight(actions, limit - 1)


@every_size
def test_afab_keeps_every_micro_batch(num_ranks):
    for num_micro_batches, schedules, _ in pipelines(("afab", None), num_ranks):
        for actions in schedules:
            check_in_flight(actions, num_micro_batches)
            with pytest.raises(BrokenError, match="in flight"):
                check_in_flight(actions, num_micro_batches - 1)


@every_schedule
def test_one_rank_transfers_nothing(schedule):
    schedules, placement = pipeline(schedule[0], 1, 5, schedule[1])
    assert not any(isinstance(action, Transfer) for action in schedules[0])
    assert any(isinstance(action, Handover) for action in schedules[0]) == (placement.num_chunks > 1)


def test_a_receive_is_posted_before_the_computation_in_which_it_arrives():
    """Rank 1 of 2: the second activation is expected while the first one is computed."""
    words = spelt(pipeline("1f1b", 2, 3)[0][1], Placement(2), 1).split()
    assert words.index("<a1") < words.index("F1.0")


# What ranks compute, beside torch.distributed.pipelining and written out.


def spelt(actions, placement, rank):
    """F, B, I or W with stage.micro batch; > sends and < receives an activation or a gradient."""
    words = []
    for action in actions:
        if type(action) in LETTERS:
            stage = placement.stage(rank, action.chunk)
            words.append(f"{LETTERS[type(action)]}{stage}.{action.micro_batch}")
        elif isinstance(action, Transfer):
            words.append(f"{'>' if action.verb == 'send' else '<'}{action.kind[0]}{action.micro_batch}")
    return " ".join(words)


def spelt_by_torch(schedule, num_ranks, num_micro_batches, num_chunks, rank):
    """torch's list; what it is asked for is arithmetic alone, and needs no process group."""
    made = schedule.__new__(schedule)
    made.pp_group_size, made._n_microbatches = num_ranks, num_micro_batches
    made.n_local_stages, made.num_stages = num_chunks, num_ranks * num_chunks
    made.number_of_rounds = max(1, num_micro_batches // num_ranks)
    made.microbatches_per_round = num_micro_batches // made.number_of_rounds
    letters = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    operations = [action for action in made._calculate_single_rank_operations(rank) if action is not None]
    return " ".join(
        f"{letters[o.computation_type.name]}{o.stage_index}.{o.microbatch_index}" for o in operations
    )


TORCH = [
    ("interleaved", 2, peer.ScheduleInterleaved1F1B),
    ("interleaved", 3, peer.ScheduleInterleaved1F1B),
    ("zb-h1", 1, peer.ScheduleInterleavedZeroBubble),
    ("zbv", 2, peer.ScheduleZBVZeroBubble),
]


@pytest.mark.parametrize(("name", "num_chunks", "schedule"), TORCH)
def test_what_ranks_compute_is_what_torch_says(name, num_chunks, schedule):
    """torch refuses interleaved micro batches that its rounds do not divide."""
    for num_ranks in range(2, 9):
        for num_micro_batches in range(1, 17):
            if name == "interleaved" and num_micro_batches % max(1, num_micro_batches // num_ranks):
                continue
            orders, placement = orders_of(name, num_ranks, num_micro_batches, num_chunks)
            for rank, order in enumerate(orders):
                expected = spelt_by_torch(schedule, num_ranks, num_micro_batches, num_chunks, rank)
                assert spelt(order, placement, rank) == expected, (num_ranks, num_micro_batches, rank)


GOLDEN = {
    ("zb-h1", 1): "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 F1.3 I1.3 W1.2 W1.3",
    (
        "interleaved",
        0,
    ): "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3",
    ("zbv", 1): "F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 F1.3 I1.1 W1.1 F2.3 I2.2 W2.2 "
    "I1.2 I2.3 I1.3 W1.2 W2.3 W1.3",
}


@pytest.mark.parametrize(("name", "rank"), GOLDEN)
def test_two_ranks_and_four_micro_batches_written_out(name, rank):
    orders, placement = orders_of(name, 2, 4)
    assert spelt(orders[rank], placement, rank) == GOLDEN[name, rank]


def test_1f1b_of_the_middle_of_three_ranks_written_out_with_its_transfers():
    schedules, placement = pipeline("1f1b", 3, 3)
    assert spelt(schedules[1], placement, 1) == (
        "<a0 <a1 F1.0 >a0 <a2 F1.1 >a1 <g0 B1.0 >g0 <g1 F1.2 >a2 B1.1 >g1 <g2 B1.2 >g2"
    )


# The checks can fail: schedules broken on purpose, in the middle of a pipeline of 4 with 6 micro batches.

RANKS, MICRO_BATCHES, RANK = 4, 6, 1


def broken(change, name="1f1b"):
    """The pipeline after `change` rewrote one rank's list in place."""
    schedules, placement = pipeline(name, RANKS, MICRO_BATCHES)
    change(schedules[RANK])
    return schedules, placement


def swap(one, other):
    def change(actions):
        i, j = actions.index(one), actions.index(other)
        actions[i], actions[j] = actions[j], actions[i]

    return change


def send(kind, micro_batch):
    return Transfer("send", kind, micro_batch, RANK + (1 if kind == "activation" else -1))


def receive(kind, micro_batch):
    return Transfer("receive", kind, micro_batch, RANK + (-1 if kind == "activation" else 1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("1f1b", lambda actions: actions.remove(Forward(3))),
        ("1f1b", lambda actions: actions.append(Backward(3))),
        ("1f1b", swap(Forward(2), Backward(2))),
        ("1f1b", swap(Forward(0), Forward(1))),
        ("1f1b", swap(Backward(4), Backward(5, is_last=True))),
        ("zb-h1", swap(BackwardInput(2), BackwardWeight(2))),
        ("zb-h1", lambda actions: actions.remove(BackwardWeight(2))),
        ("zbv", swap(BackwardWeight(1, 0), BackwardWeight(2, 0))),
    ],
)
def test_control_wrong_computations_are_noticed(name, change):
    schedules, placement = broken(change, name)
    with pytest.raises(BrokenError):
        check_computation(schedules[RANK], placement.num_chunks, MICRO_BATCHES, trains=True)


@pytest.mark.parametrize(
    "change",
    [
        swap(receive("activation", 0), Forward(0)),
        swap(Forward(1), send("activation", 1)),
        swap(receive("gradient", 0), Backward(0)),
        lambda actions: actions.remove(send("activation", 1)),
        lambda actions: actions.append(send("activation", 1)),
    ],
    ids=["used early", "sent early", "gradient used early", "never sent", "sent twice"],
)
def test_control_wrong_data_flow_is_noticed(change):
    schedules, placement = broken(change)
    with pytest.raises(BrokenError):
        check_data_flow(schedules[RANK], RANK, placement)


def test_control_a_handover_that_is_lost_is_noticed():
    schedules, placement = pipeline("zbv", RANKS, MICRO_BATCHES)
    schedules[-1].remove(Handover("gradient", 2, 1, 0))
    with pytest.raises(BrokenError):
        check_data_flow(schedules[-1], RANKS - 1, placement)


def test_control_sends_out_of_order_are_noticed():
    schedules, placement = broken(swap(send("activation", 0), send("activation", 1)))
    with pytest.raises(BrokenError, match="send"):
        check_order(schedules, placement)


def test_control_a_tensor_for_another_chunk_is_noticed():
    schedules, placement = pipeline("interleaved", RANKS, MICRO_BATCHES)
    actions = schedules[RANK]
    place = next(i for i, a in enumerate(actions) if isinstance(a, Transfer) and a.verb == "receive")
    actions[place] = replace(actions[place], chunk=1 - actions[place].chunk)
    with pytest.raises(BrokenError, match="send"):
        check_order(schedules, placement)


def test_control_two_neighbours_that_both_receive_first_are_a_deadlock():
    schedules, _ = pipeline("1f1b", RANKS, MICRO_BATCHES)
    check_rendezvous(schedules)
    swap(send("activation", 2), receive("gradient", 0))(schedules[RANK])
    with pytest.raises(BrokenError, match="deadlock"):
        check_rendezvous(schedules)


def test_control_afab_does_not_pass_for_1f1b_in_memory():
    with pytest.raises(BrokenError, match="in flight"):
        check_in_flight(pipeline("afab", RANKS, MICRO_BATCHES)[0][RANK], RANKS - RANK)


@every_schedule
def test_control_a_dropped_or_renumbered_transfer_is_noticed_wherever_it_stood(schedule):
    schedules, placement = pipeline(schedule[0], RANKS, MICRO_BATCHES, schedule[1])
    for rank, actions in enumerate(schedules):
        for i, action in enumerate(actions):
            if not isinstance(action, Transfer):
                continue
            other_number = replace(action, micro_batch=action.micro_batch + 100)
            for put in ([], [other_number]):
                changed = [*schedules[:rank], [*actions[:i], *put, *actions[i + 1 :]], *schedules[rank + 1 :]]
                with pytest.raises(BrokenError):
                    check_order(changed, placement)
                with pytest.raises(BrokenError):
                    check_rendezvous(changed)


def test_control_ranks_that_wait_for_each_other_are_no_schedule():
    orders, placement = orders_of("1f1b", 2, 2)
    orders[1].reverse()
    with pytest.raises(ValueError, match="wait for each other"):
        with_transfers(orders, placement)


# Where stages lie, and what a user can get wrong.


def test_every_stage_lies_on_one_rank_and_a_v_has_both_ends_on_the_first():
    for num_ranks in range(1, 9):
        for num_chunks, is_v in ((1, False), (2, False), (3, False), (2, True)):
            placement, held = Placement(num_ranks, num_chunks, is_v), defaultdict(list)
            for rank in range(num_ranks):
                for chunk in range(num_chunks):
                    held[placement.stage(rank, chunk)].append((rank, chunk))
            assert held == {stage: [placement.holder(stage)] for stage in range(num_ranks * num_chunks)}
            if is_v:
                assert placement.holder(0)[0] == placement.holder(2 * num_ranks - 1)[0] == 0


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'zero_bubble' is unknown: choose one of 1f1b, afab, interleaved"):
        build_schedule("zero_bubble", 0, 1, 1)


@pytest.mark.parametrize(
    ("name", "num_chunks", "message"),
    [
        ("1f1b", 2, "num_chunks is 2 and pipeline_schedule 1f1b has 1: set parallel.num_chunks=1"),
        ("zbv", 3, "num_chunks is 3 and pipeline_schedule zbv has 2: set parallel.num_chunks=2"),
        ("interleaved", 1, "num_chunks is 1 and pipeline_schedule interleaved has 2 or more"),
    ],
)
def test_chunks_that_a_schedule_does_not_have_are_refused(name, num_chunks, message):
    with pytest.raises(ValueError, match=message):
        placement_of(name, 2, num_chunks)


def test_a_step_without_micro_batches_is_refused():
    with pytest.raises(ValueError, match="0 micro batches"):
        build_schedule("1f1b", 0, 2, 0)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} does not exist in a pipeline of 2"):
        build_schedule("1f1b", rank, 2, 4)
