"""What would keep a job from the end of its step is named: by rank, and by the place in the step."""

import re

import pytest

from megalite.dryrun import groups as groups_module
from megalite.dryrun.groups import build_roster
from megalite.dryrun.log import Call, Exchange, Log, Passage
from megalite.dryrun.match import Matching, faults_of_groups
from megalite.dryrun.play import Play
from megalite.dryrun.roster import Roster
from megalite.dryrun.verdict import dry_run, faults_of
from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import Topology
from megalite.plan import layout as layout_module
from tests.dryrun.jobs import job_of, own_entries, redirected, sends_of, sound_logs, with_log
from tests.trainers import Case


def one_fault(pattern: str, faults: list[str]) -> None:
    assert any(re.search(pattern, fault) for fault in faults), faults


def test_sound_logs_have_none():
    logs, roster = sound_logs()
    assert faults_of(logs, roster) == []
    assert list(faults_of_groups(roster)) == []


def test_a_missing_send_is_named_with_the_rank_that_waits_and_the_micro_batch():
    entries = own_entries(5)
    del entries[sends_of(entries)[0]]
    (fault,) = faults_of(with_log(5, entries), sound_logs()[1])
    assert "transfer 1 of rank 5 to rank 9" in fault
    assert "sends activation of micro batch 1 from stage 1" in fault
    assert "receives activation of micro batch 0 from stage 1" in fault


def test_a_last_send_that_is_missing_is_named():
    entries = own_entries(5)
    del entries[sends_of(entries)[-1]]
    (fault,) = faults_of(with_log(5, entries), sound_logs()[1])
    assert "rank 5 sends nothing more to rank 1, which receives gradient of micro batch 1" in fault


def test_two_swapped_collectives_of_one_group_are_named_with_both_ranks():
    entries = own_entries(2)
    calls = [at for at, e in enumerate(entries) if isinstance(e, Call) and e.group == "tp"]
    first = next(at for at in calls if entries[at].kind == "all_gather")
    second = next(at for at in calls if at > first and entries[at].kind == "reduce_scatter")
    entries[first], entries[second] = entries[second], entries[first]
    (fault,) = faults_of(with_log(2, entries), sound_logs()[1])
    assert re.search(r"of group tp \[2, 3\]: rank . enters \w+ of [\d,]+ bytes", fault)
    assert "rank 2" in fault and "rank 3" in fault and "layer 0" in fault


def with_swapped(rank: int, first: str, second: str) -> list[Log]:
    """The last collective of one group that one of another follows, and that one, the other way round."""
    entries = own_entries(rank)
    groups = [entry.group if isinstance(entry, Call) else "" for entry in entries]
    later = len(groups) - 1 - groups[::-1].index(second)
    sooner = later - 1 - groups[:later][::-1].index(first)
    entries[sooner], entries[later] = entries[later], entries[sooner]
    return with_log(rank, entries)


def test_two_swapped_collectives_of_two_groups_are_a_deadlock_whose_circle_is_told():
    """Each group's own order is right: only in play does it show."""
    logs, roster = with_swapped(2, "tp", "world"), sound_logs()[1]
    assert list(Matching(logs, roster).faults()) == []
    (fault,) = faults_of(logs, roster)
    assert fault.startswith("16 of 16 ranks wait for ever: rank 0 is in reduce_scatter")
    assert "(backward of micro batch 1, chunk 0, layer 0) over dp and waits for rank 2; rank 2 is in" in fault
    assert fault.endswith("all_reduce of 16 bytes (after the passes) over world and waits for rank 0")


def test_a_swap_that_makes_no_circle_is_no_deadlock():
    """The groups have one rank in common: the others of both get on, and come to it."""
    logs, roster = with_swapped(2, "dp", "pp x tp"), sound_logs()[1]
    assert logs[2] != sound_logs()[0][2]
    assert faults_of(logs, roster) == []


def test_a_wrong_peer_is_named_from_both_ends():
    entries = own_entries(1)
    at = sends_of(entries)[0]
    entries[at] = redirected(entries[at], offset=2)
    faults = faults_of(with_log(1, entries), sound_logs()[1])
    one_fault(
        "transfer 1 of rank 1 to rank 9: rank 1 sends activation of micro batch 0.* never receives", faults
    )
    one_fault("transfer 1 of rank 1 to rank 5: .* receives activation of micro batch 0", faults)


def test_a_group_that_one_rank_makes_in_another_order_is_named(monkeypatch):
    class Reversed(Topology):
        def groups(self, *axes):
            lists = super().groups(*axes)
            return lists[::-1] if axes == ("tp",) else lists

    build = ParallelContext.build

    def built(topology, rank, *rest):
        if rank == 6:
            topology = Reversed(topology.world_size, tp_size=2, pp_size=4)
        return build(topology, rank, *rest)

    monkeypatch.setattr(groups_module.ParallelContext, "build", built)
    faults = list(faults_of_groups(build_roster(job_of(Case(tp=2, pp=4, dp=2)).run, 16)))
    assert faults == [
        "rank 6 makes ranks [14, 15] as its group number 1, where other ranks make ranks [0, 1]: all ranks "
        "must make all groups in one order"
    ]


def test_ranks_that_see_unlike_members_of_a_group_are_named():
    groups = [{"tp": (0, 1)}, {"tp": (1, 2)}, {"tp": (1, 2)}]
    faults = list(faults_of_groups(Roster(groups, [()] * 3, [0] * 3)))
    assert "rank 0 has ranks [0, 1] as its group tp, of which rank 1 has ranks [1, 2]" in faults


def test_a_stage_without_layers_is_named(monkeypatch):
    layers_of_stage = layout_module.layers_of_stage

    def layers(num_layers, num_stages, stage, **options):
        given = layers_of_stage(num_layers, num_stages, stage, **options)
        return range(0) if stage == 2 else given

    monkeypatch.setattr(layout_module, "layers_of_stage", layers)
    job = job_of(Case(tp=2, pp=4, dp=2))
    faults = dry_run(job.run, job.deepspeed, job.world_size, gpus_per_node=8).faults
    assert faults == [
        "stage 2 of 4 has no layers: each needs one at least",
        "layer 2 lies on 0 stages: each belongs to one",
    ]


def exchange(verb, peer_offset, tensor="x"):
    return Exchange((Passage(verb, "pp", peer_offset, 4, tensor),), f"{verb} {tensor}")


def test_two_ranks_that_both_send_first_wait_for_each_other():
    members = (0, 1)
    roster = Roster([{"pp": members}, {"pp": members}], [(), ()], [0, 1])
    logs = [(exchange("send", 1, "a"), exchange("receive", 1, "b"))] * 1
    logs += [(exchange("send", 1, "b"), exchange("receive", 1, "a"))]
    assert list(Matching(logs, roster).faults()) == []
    told = Play(logs, roster).run()
    assert told is not None and told.startswith("2 of 2 ranks wait for ever: rank ")
    assert "is to send a (send a) and waits for rank 1" in told


def test_two_ranks_that_send_and_receive_at_once_do_not():
    members = (0, 1)
    roster = Roster([{"pp": members}, {"pp": members}], [(), ()], [0, 1])

    def both(out, into):
        return Exchange((Passage("send", "pp", 1, 4, out), Passage("receive", "pp", 1, 4, into)), "at once")

    logs = [(both("a", "b"),), (both("b", "a"),)]
    assert faults_of(logs, roster) == []


@pytest.mark.parametrize("missing", [0, 1])
def test_a_collective_that_a_rank_leaves_out_is_named(missing):
    members = (0, 1, 2)
    roster = Roster([{"tp": members}] * 3, [()] * 3, [0] * 3)
    log = (Call("tp", "all_reduce", 8, "first"), Call("tp", "all_gather", 16, "second"))
    logs = [log, log, (log[1 - missing],)]
    (fault,) = faults_of(logs, roster)
    assert f"collective {missing + 1} of group tp" in fault and "rank 2 enters" in fault
