"""What rank 0 makes of findings, on jobs that are only written down."""

import pytest

from megalite.exit_status import FINISHED, MISTAKE, NODE, STORAGE
from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import Topology
from megalite.preflight.fault import Fault, fault_of_nodes, spans, status_of
from megalite.preflight.groups import names_of_groups
from megalite.preflight.verdict import Verdict

GPU = "NVIDIA A100-SXM4-80GB"


def arrivals(num_ranks: int, ranks_per_node: int) -> dict[int, dict]:
    found = {"inventory": {"code": "1"}, "unreadable": {}}
    return {rank: {"node": f"n{rank // ranks_per_node}", **found} for rank in range(num_ranks)}


def health(device: str = GPU, tflops: float = 200.0, problems: tuple[str, ...] = ()) -> dict:
    speed = {"device": device, "flops_per_second": tflops * 1e12}
    return {"problems": list(problems), "unreadable": {}, **speed}


@pytest.fixture
def verdict() -> Verdict:
    """Eight ranks that have come, two a node."""
    verdict = Verdict(8, 2)
    verdict.judge_arrivals(arrivals(8, 2))
    assert verdict.status == FINISHED
    return verdict


def test_a_mistake_outweighs_a_full_disk_and_that_a_bad_node():
    kinds = [Fault(NODE, "a"), Fault(STORAGE, "b"), Fault(MISTAKE, "c")]
    assert [status_of(kinds[:count]) for count in range(4)] == [FINISHED, NODE, STORAGE, MISTAKE]


def test_what_few_nodes_do_not_see_is_theirs_and_what_half_do_not_is_a_mistake():
    nodes = ["a", "a", "b", "c", "d"]
    assert [fault.nodes for fault in fault_of_nodes("data", {"b": "no"}, nodes)] == [("b",)]
    [fault] = fault_of_nodes("data", {"b": "no", "c": "no"}, nodes)
    assert fault == Fault(MISTAKE, "data: no (on b, c)")
    assert fault_of_nodes("data", {}, nodes) == []


def test_ranks_are_told_as_spans():
    assert spans([8, 0, 1, 2, 5, 6]) == "0-2, 5-6, 8"


def test_a_node_none_of_whose_ranks_come_has_its_name_from_the_list():
    come = {rank: value for rank, value in arrivals(8, 2).items() if rank not in (4, 5)}
    verdict = Verdict(8, 2, ["n0", "n1", "n2", "n3"])
    verdict.judge_arrivals(come)
    assert [fault.text for fault in verdict.faults] == [
        "rank 4 (n2): has not come",
        "rank 5 (n2): has not come",
    ]
    assert verdict.bad_nodes == ["n2"]


def test_the_slow_rank_is_named_and_ranks_a_little_slower_are_not(verdict):
    speeds = [200, 190, 210, 150, 205, 130, 200, 195]  # 0.7 of the median 200 is 140
    verdict.judge_health({rank: health(tflops=speed) for rank, speed in enumerate(speeds)})
    told = "is slow: 130 TFLOP/s in a matrix product, where the median is 200"
    assert [fault.text for fault in verdict.faults] == [f"rank 5 (n2): {told}"]
    assert verdict.status == NODE and verdict.bad_nodes == ["n2"]


def test_a_rank_that_sees_no_gpu_is_named_where_others_do(verdict):
    verdict.judge_health({rank: health("cpu" if rank == 3 else GPU) for rank in range(8)})
    assert [fault.text for fault in verdict.faults] == ["rank 3 (n1): sees no GPU, and others do"]


def test_a_job_of_cpus_alone_is_well(verdict):
    verdict.judge_health({rank: health("cpu", 0.1) for rank in range(8)})
    assert verdict.status == FINISHED


def test_where_most_nodes_are_bad_none_is_left_out(verdict):
    verdict.judge_health({rank: health(problems=("broken",) if rank < 6 else ()) for rank in range(8)})
    assert verdict.status == NODE and len(verdict.faults) == 6 and verdict.bad_nodes == []


def test_a_rank_that_falls_silent_is_named(verdict):
    verdict.judge_health({rank: health() for rank in range(7)})
    assert [fault.text for fault in verdict.faults] == ["rank 7 (n3): is silent since it came"]


def test_a_group_that_is_stuck_within_one_node_is_that_nodes(verdict):
    stuck = {rank: "tp" if rank in (2, 3) else "" for rank in range(8)}
    found = {"bandwidths": {}, "problems": []}
    verdict.judge_groups({rank: {"stuck": group, **found} for rank, group in stuck.items()})
    assert [fault.text for fault in verdict.faults] == ["a collective over tp did not end on ranks 2-3 (n1)"]
    assert verdict.bad_nodes == ["n1"]


def test_every_kind_of_group_is_measured_once():
    context = ParallelContext(Topology(16, tp_size=2, pp_size=2, ep_size=2))
    assert list(names_of_groups(context)) == ["tp", "pp", "dp", "pp x tp", "dp x cp x tp", "ep", "edp"]
    assert list(names_of_groups(ParallelContext(Topology(2, tp_size=2)))) == ["tp"]
