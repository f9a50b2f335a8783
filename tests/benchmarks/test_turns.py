"""Worlds of a benchmark take turns, each on all of its ranks."""

import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.turns import in_turns


def make(folder: Path, name: str):
    """Notes when it begins and ends, and counts its calls."""
    calls = 0

    def act() -> int:
        nonlocal calls
        calls += 1
        began = time.monotonic()
        time.sleep(0.05)
        with (folder / "log").open("a", encoding="utf-8") as log:
            log.write(f"{began} {time.monotonic()} {name}\n")
        return calls

    act()
    return act


def test_bodies_take_turns_and_give_a_result_for_each_round_and_rank(tmp_path):
    bodies = {name: partial(make, tmp_path, name) for name in ("ours", "theirs")}
    assert in_turns(2, bodies, rounds=3) == {name: [[2, 3, 4]] * 2 for name in bodies}
    lines = (tmp_path / "log").read_text().splitlines()
    rows = sorted((line.split() for line in lines), key=lambda row: float(row[0]))
    turns = [rows[at : at + 2] for at in range(0, len(rows), 2)]
    assert [{name for *_, name in turn} for turn in turns] == [{"ours"}, {"theirs"}] * 4
    for before, after in pairwise(turns):
        assert max(float(row[1]) for row in before) <= min(float(row[0]) for row in after)


def fail():
    raise ValueError("no such peer")


def test_a_world_that_fails_ends_the_others_and_says_why(tmp_path):
    with pytest.raises(ValueError, match="no such peer"):
        in_turns(1, {"ours": partial(make, tmp_path, "ours"), "theirs": fail}, rounds=2)
