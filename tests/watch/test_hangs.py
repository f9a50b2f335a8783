"""When a rank counts as hanging, and which: the decisions of rank 0 under a clock that the test turns."""

from math import inf

import pytest

from megalite.watch.clock import AwakeClock
from megalite.watch.hangs import REPORT_SECONDS, Hangs
from megalite.watch.limits import BEATS_PER_SECOND, MISSED_BEATS, Limit, Limits
from megalite.watch.marks import Mark, Marks
from megalite.watch.stacks import FROZEN, WRITE_SECONDS
from megalite.watch.verdict import Account, verdict

STEP_SECONDS, SILENT_SECONDS, FACTOR, SAVING_SECONDS, START_SECONDS = 60.0, 20.0, 10.0, 600.0, 1000.0
PLACES = {
    "start-up": Limit(START_SECONDS, "start", START_SECONDS, "start"),
    "reading": Limit(STEP_SECONDS, "step", SILENT_SECONDS, "silent", FACTOR),
    "passes": Limit(STEP_SECONDS, "step", SILENT_SECONDS, "silent", FACTOR),
    "saving": Limit(SAVING_SECONDS, "saving", SILENT_SECONDS, "silent", FACTOR),
}


class World:
    """Ranks that give signs of life each second, and answer, as long as they are alive."""

    def __init__(self, world_size=4, nodes=None, places=PLACES):
        self.now = 0.0
        self.limits = Limits(places, world_size)
        self.hangs = Hangs(self.limits, "run/stacks", lambda: self.now)
        self.marks = {rank: Marks("start-up") for rank in range(world_size)}
        self.stopped, self.busy, self.orders = set(), set(), []
        self.states, self.error = {}, None
        for rank, marks in self.marks.items():
            process = {"pid": rank, "node": (nodes or {}).get(rank, "node"), "dump_fd": -1}
            self.hangs.watch(rank, f"rank {rank}", {"process": process, "mark": list(marks.last)})

    def reach(self, place, step, ranks=None):
        for rank in self.marks if ranks is None else ranks:
            self.marks[rank](place, step)

    def wait(self, seconds):
        """Let time pass in seconds; the verdict, if there is one by then."""
        for _ in range(round(seconds)):
            self.now += 1.0
            for rank in self.marks.keys() - self.stopped:
                self.hangs.hear(rank, {"beat": list(self.marks[rank].last)})
            for rank, order in self.hangs.orders().items():
                self.orders.append((rank, order))
                if rank not in self.stopped:
                    self._obey(rank, order)
        return self.hangs.verdict

    def step(self, seconds, step, place="passes"):
        self.reach(place, step)
        return self.wait(seconds)

    def _obey(self, rank, order):
        if "ask" in order:
            waits = rank not in self.busy
            frame = "all_reduce (dist.py:1)" if waits else "loop (mine.py:7)"
            report = {"mark": list(self.marks[rank].last), "frame": frame, "waits": waits}
            self.hangs.hear(rank, {"report": report})
        if "write" in order:
            written = {other: self.states.get(other, "is stopped") for other in order["write"]}
            self.hangs.hear(rank, {"written": written | ({"error": self.error} if self.error else {})})


def test_a_rank_without_sign_of_life_is_named_within_its_limit():
    world = World()
    world.step(5, 1)
    world.stopped = {2}
    assert world.wait(SILENT_SECONDS) is None
    found = world.wait(REPORT_SECONDS + 4)
    assert found.startswith("rank 2 is stopped at step 1, passes: no sign of life for ")
    assert "at most 20.0 expected (silent)" in found and found.endswith("are in run/stacks")


def test_the_neighbour_on_its_node_looks_after_a_silent_rank_and_none_elsewhere_does():
    world = World(nodes={0: "a", 1: "a", 2: "b", 3: "b"})
    world.step(5, 1)
    world.stopped = {2}
    assert world.wait(SILENT_SECONDS + REPORT_SECONDS + 4)
    writes = {rank: list(order["write"]) for rank, order in world.orders if "write" in order}
    assert writes == {0: [], 1: [], 3: ["2"]}


def test_a_whole_node_that_is_silent_is_named_with_all_its_ranks():
    world = World(nodes={0: "a", 1: "a", 2: "b", 3: "b"})
    world.step(5, 1)
    world.stopped = {2, 3}
    found = world.wait(SILENT_SECONDS + REPORT_SECONDS + 4)
    assert found.startswith(f"rank 2 and 1 more (3) {FROZEN} at step 1, passes:")


def test_a_busy_rank_is_named_and_not_those_that_wait_for_it():
    world = World()
    world.step(5, 7)
    world.busy = {1}
    assert world.wait(STEP_SECONDS - 4) is None
    found = world.wait(10)
    assert found.startswith("rank 1 hangs in loop (mine.py:7) at step 7, passes: no progress for ")
    assert "at most 60.0 expected (step)" in found


def test_the_limit_is_learnt_from_the_longest_stay_in_the_same_place():
    world = World()
    world.step(20, 1)
    world.reach("reading", 2)
    world.wait(1)
    world.step(FACTOR * 20 - 5, 2)
    assert world.hangs.verdict is None
    assert world.wait(20) is not None

    other = World()
    other.step(20, 1, "reading")  # teaches nothing about the passes
    assert other.step(STEP_SECONDS + 5, 2) is not None


def test_start_up_teaches_nothing_and_has_its_own_limit_of_silence_too():
    world = World()
    world.stopped = {0, 1, 2, 3}
    assert world.wait(START_SECONDS - 5) is None
    world.stopped = set()
    assert world.step(STEP_SECONDS + 5, 1) is not None


def test_a_slow_save_is_no_hang_and_a_rank_that_never_ends_it_is():
    world = World()
    world.reach("saving", 1)
    world.busy = {3}
    world.wait(5)
    world.reach("passes", 2, [0, 1, 2])  # where they wait for rank 3
    assert world.wait(SAVING_SECONDS - 10) is None
    world.reach("passes", 2, [3])
    assert world.wait(5) is None
    world.reach("saving", 2, [0, 1, 2])
    found = world.wait(STEP_SECONDS)
    assert found.startswith("rank 3 hangs in loop (mine.py:7) at step 2, passes:")


def test_a_rank_that_moves_when_it_is_asked_is_let_off_and_has_taught_its_time():
    world = World()
    world.reach("passes", 1)
    world.wait(STEP_SECONDS)
    world.stopped = {1}  # its thread is late, and its answer tells of progress
    world.wait(3)
    assert any("ask" in order for _, order in world.orders)
    world.reach("reading", 2)
    world.stopped = set()
    assert world.wait(SILENT_SECONDS) is None
    assert not any("write" in order for _, order in world.orders)
    assert world.limits.seconds("passes") >= FACTOR * STEP_SECONDS
    assert world.wait(STEP_SECONDS) is not None  # and is watched as before


def test_a_rank_that_is_slow_to_give_signs_but_answers_is_let_off():
    world = World()
    world.step(5, 1)
    world.stopped = {3}
    world.wait(SILENT_SECONDS + 1)
    world.stopped = set()
    world.reach("reading", 2)
    assert world.wait(30) is None


def test_ranks_that_left_are_not_missed():
    world = World()
    world.step(5, 1)
    world.hangs.release(3)
    world.stopped = {3}
    assert world.wait(STEP_SECONDS - 10) is None


def test_stacks_that_never_come_or_cannot_be_written_delay_the_verdict_and_no_more():
    world = World()
    world.step(5, 1)
    world.busy, world.error = {0}, "run/stacks: No space left on device"
    found = world.wait(STEP_SECONDS + 5)
    assert found.endswith("not all stacks could be written: run/stacks: No space left on device")

    world = World()
    world.step(5, 1)
    world.busy = {0}
    obey, world._obey = world._obey, lambda rank, order: None if "write" in order else obey(rank, order)
    assert world.wait(STEP_SECONDS + 5) is None
    assert world.wait(WRITE_SECONDS + 5) is not None


def test_nothing_is_watched_for_where_all_limits_are_infinite():
    world = World(places={place: Limit(inf, "", inf, "") for place in PLACES})
    world.stopped = {1}
    assert world.step(10_000, 1) is None


def test_a_clock_that_jumps_for_all_is_no_hang():
    """A laptop that sleeps for an hour, or a job that is stopped and continued as a whole."""
    system = [0.0]
    clock = AwakeClock(2.0, lambda: system[0])
    hangs = Hangs(Limits(PLACES, 1), "run/stacks", clock)
    hangs.watch(0, "rank 0", {"process": {"node": ""}, "mark": list(Mark(5, "passes", 1))})
    for second in range(10):
        system[0] += 3600.0 if second == 5 else 1.0
        assert hangs.orders() == {} and hangs.verdict is None
    assert clock() == 9 + 2.0


@pytest.mark.parametrize("world_size", [1, 4, 256, 4096, 65536])
def test_signs_of_life_are_rarer_in_a_larger_world_and_silence_allows_for_it(world_size):
    limits = Limits(PLACES, world_size)
    assert world_size / limits.beat_seconds <= max(BEATS_PER_SECOND, world_size if world_size < 256 else 0)
    assert limits.silent_seconds("passes") >= max(SILENT_SECONDS, MISSED_BEATS * limits.beat_seconds)


def at(number, frame="all_reduce (dist.py:1)", waits=True, name="rank"):
    return Account(f"{name} {number}", Mark(number, "passes", number), frame, waits)


def test_who_is_busy_is_to_blame_even_if_who_waits_is_further_behind():
    found = verdict({0: at(8), 1: at(9, "read (file.py:3)", waits=False), 2: at(9)}, "why")
    assert found == "rank 9 hangs in read (file.py:3) at step 9, passes: why"


def test_of_silent_ranks_the_one_that_is_furthest_behind_is_to_blame():
    silent = {rank: at(number, frame=None, waits=False) for rank, number in ((0, 9), (1, 8))}
    assert verdict({**silent, 2: at(7, waits=False)}, "why") == f"rank 8 {FROZEN} at step 8, passes: why"


def test_of_ranks_that_all_wait_the_one_that_is_behind_is_named_as_waiting():
    where = "in all_reduce (dist.py:1) at step 7, passes, where each rank waits for others"
    assert verdict({0: at(8), 1: at(7)}, "why") == f"rank 7 hangs {where}: why"


def test_ranks_that_all_wait_at_the_same_place_are_all_named():
    found = verdict({rank: at(7) for rank in range(20)}, "why")
    assert found.startswith("all 20 ranks hang in all_reduce (dist.py:1) at step 7, passes, where each rank")


def test_many_culprits_are_counted_and_the_first_are_listed():
    ranks = {rank: at(7, "loop (mine.py:7)", waits=False, name=f"rank {rank} at") for rank in range(20)}
    found = verdict({**ranks, 20: at(7)}, "why")
    assert found.startswith("rank 0 at 7 and 19 more (1, 2, 3, 4, 5, 6, 7, 8, ...) hang in loop (mine.py:7)")
