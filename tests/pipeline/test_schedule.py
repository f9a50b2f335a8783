"""Every schedule for up to 8 stages and 16 micro batches, without a process.

Each property is a check that raises `BrokenError`. The same checks are run on schedules broken on purpose: a
check that does not notice is no check.
"""

from dataclasses import replace
from itertools import pairwise

import pytest

from megalite.pipeline.schedule import (
    Backward,
    Exchange,
    Forward,
    Transfer,
    all_forward_all_backward,
    build_schedule,
    forward_only,
    one_forward_one_backward,
)

TRAINING = [all_forward_all_backward, one_forward_one_backward]
ALL = [*TRAINING, forward_only]


class BrokenError(Exception):
    """A schedule lacks a property."""


def require(holds, message):
    if not holds:
        raise BrokenError(message)


# The checks. A schedule of the whole pipeline is a list of action lists, one per stage.


def check_computation(actions, num_micro_batches, trains):
    """Each micro batch goes forward exactly once, then backward exactly once if the schedule trains."""
    forwards = [action.micro_batch for action in actions if isinstance(action, Forward)]
    backwards = [action.micro_batch for action in actions if isinstance(action, Backward)]
    require(forwards == list(range(num_micro_batches)), f"forwards {forwards}")
    require(backwards == (forwards if trains else []), f"backwards {backwards}")
    for micro_batch in backwards:
        order = [type(action) for action in actions if getattr(action, "micro_batch", None) == micro_batch]
        require(order == [Forward, Backward], f"backward {micro_batch} comes before its forward")
    marks = [action.is_last for action in actions if isinstance(action, Backward)]
    require(marks == [False] * (len(marks) - 1) + [True] * bool(marks), f"the last backward by {marks}")


def check_data_flow(actions, stage, num_stages):
    """What a computation needs has arrived, what is sent has been computed, and all results are sent."""
    received, computed, sent = set(), set(), set()
    for action in actions:
        match action:
            case Forward(micro_batch):
                arrived = ("activation", micro_batch) in received
                require(stage == 0 or arrived, f"{action} lacks its input")
                computed.add(("activation", micro_batch))
            case Backward(micro_batch):
                arrived = ("gradient", micro_batch) in received
                require(stage == num_stages - 1 or arrived, f"{action} lacks its gradient")
                computed.add(("gradient", micro_batch))
            case Exchange(transfers):
                for transfer in transfers:
                    what = transfer.kind, transfer.micro_batch
                    if transfer.verb == "send":
                        require(what in computed, f"{transfer} comes too early")
                    (sent if transfer.verb == "send" else received).add(what)
    for kind, micro_batch in computed:
        has_taker = stage < num_stages - 1 if kind == "activation" else stage > 0
        require(not has_taker or (kind, micro_batch) in sent, f"an {kind} is never sent")


def check_order(schedules):
    """Between neighbours, what is sent first is received first, in both directions."""
    for left, right in pairwise(range(len(schedules))):
        for kind, sender, receiver in (("activation", left, right), ("gradient", right, left)):
            sent = traffic(schedules[sender], "send", kind, receiver)
            received = traffic(schedules[receiver], "receive", kind, sender)
            require(sent == received, f"send {kind} {sent} meets receive {received}")


def traffic(actions, verb, kind, peer):
    transfers = [t for action in actions if isinstance(action, Exchange) for t in action.transfers]
    return [t.micro_batch for t in transfers if (t.verb, t.kind, t.peer) == (verb, kind, peer)]


def check_in_flight(actions, limit):
    """At most `limit` micro batches are between their forward and their backward."""
    in_flight = 0
    for action in actions:
        in_flight += isinstance(action, Forward) - isinstance(action, Backward)
        require(in_flight <= limit, f"{in_flight} micro batches in flight, at most {limit} allowed")


def operations(stage, exchange):
    """{(sender, receiver, kind, micro batch)} of one exchange."""
    return {
        ((stage, t.peer) if t.verb == "send" else (t.peer, stage)) + (t.kind, t.micro_batch)
        for t in exchange.transfers
    }


def check_rendezvous(schedules):
    """Nothing is buffered: an exchange ends once the peers posted all its operations; all lists end."""

    def meet(posted):
        for stage, mine in enumerate(posted):
            for other, theirs in enumerate(posted):
                if stage != other and mine & theirs:
                    common = mine & theirs
                    mine -= common
                    theirs -= common
                    return True
        return False

    run(schedules, meet)


def check_groups(schedules):
    """As NCCL: what a rank posts to another in one group is exactly what that one posts in one group."""

    def between(operations, one, other):
        return {operation for operation in operations if {operation[0], operation[1]} == {one, other}}

    def meet(posted):
        for stage in range(len(posted) - 1):
            mine = between(posted[stage], stage, stage + 1)
            theirs = between(posted[stage + 1], stage, stage + 1)
            if mine and theirs:
                require(mine == theirs, f"stage {stage} posts {mine}, stage {stage + 1} posts {theirs}")
                posted[stage] -= mine
                posted[stage + 1] -= theirs
                return True
        return False

    run(schedules, meet)


def run(schedules, meet):
    """Advance all stages as far as `meet`, which completes posted operations, allows."""
    position = [0] * len(schedules)
    posted: list[set] = [set() for _ in schedules]
    waiting = [False] * len(schedules)
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(schedules):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                if isinstance(action, Exchange) and not waiting[stage]:
                    posted[stage] = operations(stage, action)
                    waiting[stage] = True
                if waiting[stage] and posted[stage]:
                    break
                waiting[stage] = False
                position[stage] += 1
                progress = True
        progress = meet(posted) or progress
    stuck = [stage for stage, actions in enumerate(schedules) if position[stage] < len(actions)]
    require(not stuck, f"deadlock: stages {stuck} wait for {[posted[stage] for stage in stuck]}")


# The properties, for all small cases.


def pipeline(build, num_stages, num_micro_batches):
    return [build(stage, num_stages, num_micro_batches) for stage in range(num_stages)]


def pipelines(build, num_stages):
    for num_micro_batches in range(1, 17):
        yield num_micro_batches, pipeline(build, num_stages, num_micro_batches)


every_schedule = pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
every_size = pytest.mark.parametrize("num_stages", range(1, 9))


@every_schedule
@every_size
def test_each_micro_batch_goes_forward_once_and_then_backward_once(build, num_stages):
    for num_micro_batches, schedules in pipelines(build, num_stages):
        for actions in schedules:
            check_computation(actions, num_micro_batches, trains=build in TRAINING)


@every_schedule
@every_size
def test_nothing_is_used_before_it_arrives_or_sent_before_it_is_computed(build, num_stages):
    for _, schedules in pipelines(build, num_stages):
        for stage, actions in enumerate(schedules):
            check_data_flow(actions, stage, num_stages)


@every_schedule
@every_size
def test_every_send_meets_its_receive_in_order(build, num_stages):
    for _, schedules in pipelines(build, num_stages):
        check_order(schedules)


@every_schedule
@every_size
def test_no_deadlock_when_nothing_is_buffered(build, num_stages):
    for _, schedules in pipelines(build, num_stages):
        check_rendezvous(schedules)


@every_schedule
@every_size
def test_groups_of_operations_pair_up_one_to_one_between_neighbours(build, num_stages):
    for _, schedules in pipelines(build, num_stages):
        check_groups(schedules)


@every_size
def test_1f1b_keeps_at_most_as_many_micro_batches_as_stages_remain(num_stages):
    for num_micro_batches, schedules in pipelines(one_forward_one_backward, num_stages):
        for stage, actions in enumerate(schedules):
            check_in_flight(actions, min(num_stages - stage, num_micro_batches))


@every_size
def test_afab_keeps_every_micro_batch(num_stages):
    for num_micro_batches, schedules in pipelines(all_forward_all_backward, num_stages):
        for actions in schedules:
            check_in_flight(actions, num_micro_batches)
            with pytest.raises(BrokenError, match="in flight"):
                check_in_flight(actions, num_micro_batches - 1)


@every_schedule
def test_one_stage_exchanges_nothing(build):
    assert not any(isinstance(action, Exchange) for action in build(0, 1, 5))


@every_schedule
@every_size
def test_no_exchange_is_empty_and_each_talks_to_one_neighbour(build, num_stages):
    for _, schedules in pipelines(build, num_stages):
        for stage, actions in enumerate(schedules):
            for action in actions:
                if isinstance(action, Exchange):
                    neighbours = {frozenset(operation[:2]) for operation in operations(stage, action)}
                    assert len(neighbours) == 1, (stage, action)


def exchange(stage, send_forward=None, recv_backward=None, send_backward=None, recv_forward=None):
    """An exchange with the stages beside, by the micro batches that travel."""
    rows = [
        ("send", "activation", send_forward, stage + 1),
        ("receive", "gradient", recv_backward, stage + 1),
        ("send", "gradient", send_backward, stage - 1),
        ("receive", "activation", recv_forward, stage - 1),
    ]
    return Exchange(tuple(Transfer(*row) for row in rows if row[2] is not None))


def test_1f1b_of_the_middle_of_three_stages_written_out_by_hand():
    assert one_forward_one_backward(1, 3, 3) == [
        exchange(1, recv_forward=0),
        Forward(0),
        exchange(1, send_forward=0),
        exchange(1, recv_forward=1),
        Forward(1),
        exchange(1, send_forward=1, recv_backward=0),
        Backward(0),
        exchange(1, send_backward=0, recv_forward=2),
        Forward(2),
        exchange(1, send_forward=2, recv_backward=1),
        Backward(1),
        exchange(1, send_backward=1),
        exchange(1, recv_backward=2),
        Backward(2, is_last=True),
        exchange(1, send_backward=2),
    ]


# The checks can fail: schedules broken on purpose, in the middle of a pipeline of 4 with 6 micro batches.

STAGES, MICRO_BATCHES, STAGE = 4, 6, 1


def broken(change):
    """The 1F1B pipeline after `change` rewrote one stage's list in place."""
    schedules = pipeline(one_forward_one_backward, STAGES, MICRO_BATCHES)
    change(schedules[STAGE])
    return schedules


def swap(one, other):
    def change(actions):
        i, j = actions.index(one), actions.index(other)
        actions[i], actions[j] = actions[j], actions[i]

    return change


def split(exchange, *parts):
    def change(actions):
        i = actions.index(exchange)
        actions[i : i + 1] = parts

    return change


PAIRED = exchange(STAGE, send_forward=2, recv_backward=0)
SEND, RECEIVE = exchange(STAGE, send_forward=2), exchange(STAGE, recv_backward=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda actions: actions.remove(Forward(3)),
        lambda actions: actions.append(Backward(3)),
        swap(Forward(2), Backward(2)),
        swap(Forward(0), Forward(1)),
        swap(Backward(4), Backward(5, is_last=True)),
    ],
    ids=["lost", "repeated", "backward first", "out of order", "another one marked last"],
)
def test_control_wrong_computations_are_noticed(change):
    with pytest.raises(BrokenError):
        check_computation(broken(change)[STAGE], MICRO_BATCHES, trains=True)


@pytest.mark.parametrize(
    "change",
    [
        swap(exchange(STAGE, recv_forward=0), Forward(0)),
        swap(Forward(1), exchange(STAGE, send_forward=1)),
        swap(PAIRED, Backward(0)),
        lambda actions: actions.remove(exchange(STAGE, send_forward=1)),
    ],
    ids=["used early", "sent early", "gradient used early", "never sent"],
)
def test_control_wrong_data_flow_is_noticed(change):
    with pytest.raises(BrokenError):
        check_data_flow(broken(change)[STAGE], STAGE, STAGES)


def test_control_sends_out_of_order_are_noticed():
    with pytest.raises(BrokenError, match="send activation"):
        check_order(broken(swap(exchange(STAGE, send_forward=0), exchange(STAGE, send_forward=1))))


def test_control_two_neighbours_that_both_receive_first_are_a_deadlock():
    schedules = broken(split(PAIRED, RECEIVE, SEND))
    check_rendezvous(schedules)
    mirrored = exchange(STAGE + 1, send_backward=0, recv_forward=2)
    split(mirrored, exchange(STAGE + 1, recv_forward=2), exchange(STAGE + 1, send_backward=0))(
        schedules[STAGE + 1]
    )
    for check in (check_rendezvous, check_groups):
        with pytest.raises(BrokenError, match=r"deadlock|posts"):
            check(schedules)


def test_control_a_group_split_in_two_passes_as_rendezvous_but_not_as_a_group():
    schedules = broken(split(PAIRED, SEND, RECEIVE))
    check_rendezvous(schedules)
    with pytest.raises(BrokenError, match="posts"):
        check_groups(schedules)


def test_control_afab_does_not_pass_for_1f1b_in_memory():
    with pytest.raises(BrokenError, match="in flight"):
        check_in_flight(all_forward_all_backward(STAGE, STAGES, MICRO_BATCHES), STAGES - STAGE)


@pytest.mark.parametrize("check", [check_order, check_rendezvous, check_groups])
@pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
def test_control_a_dropped_or_renumbered_exchange_is_noticed_wherever_it_stood(build, check):
    for stage, actions in enumerate(pipeline(build, STAGES, MICRO_BATCHES)):
        for i, action in enumerate(actions):
            if not isinstance(action, Exchange):
                continue
            dropped, renumbered = (pipeline(build, STAGES, MICRO_BATCHES) for _ in range(2))
            del dropped[stage][i]
            first, *others = action.transfers
            other_number = replace(first, micro_batch=first.micro_batch + 100)
            renumbered[stage][i] = Exchange((other_number, *others))
            for schedules in (dropped, renumbered):
                with pytest.raises(BrokenError):
                    check(schedules)


# What a user can get wrong.


def test_schedules_are_found_by_name():
    assert build_schedule("1f1b", 1, 4, 6) == one_forward_one_backward(1, 4, 6)
    assert build_schedule("afab", 1, 4, 6) == all_forward_all_backward(1, 4, 6)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'zero_bubble' is unknown: choose one of 1f1b, afab"):
        build_schedule("zero_bubble", 0, 1, 1)


def test_a_step_without_micro_batches_is_refused():
    with pytest.raises(ValueError, match="0 micro batches"):
        build_schedule("1f1b", 0, 2, 0)


@pytest.mark.parametrize("stage", [-1, 2])
def test_a_stage_that_does_not_exist_is_refused(stage):
    with pytest.raises(ValueError, match=f"stage {stage} does not exist in a pipeline of 2"):
        build_schedule("1f1b", stage, 2, 4)
