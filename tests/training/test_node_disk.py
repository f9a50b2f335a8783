"""A run whose saves go to its nodes first goes on bit for bit, from there or from what is shared.

Each of two ranks is on a node of its own: a folder.
"""

import shutil

import pytest

from megalite.checkpoint import local
from megalite.checkpoint.format import CheckpointError, list_steps
from megalite.training.engine import initialize_communication
from megalite.training.world import gather
from tests.harness import run_distributed
from tests.trainers import Case
from tests.training.test_resume import NUM_STEPS, Losses, live

SHARED_EVERY = 2  # of saves after each step: 1, 3 and 5, and the newest at the end
CASES = [Case(dp=2, zero=1), Case(tp=2, zero=3), Case(pp=2, zero=0)]


class Run:
    """A run that dies while it reads step 3, one rank's view; `told` are its lines."""

    def __init__(self, rank, case, folder):
        self.rank, self.case, self.folder, self.losses, self.told = rank, case, folder, Losses(), []
        self.local_dir = folder.with_name(folder.name + " local")

    def live(self, end, **settings):
        manner = {"save_every_steps": 1, "shared_every_saves": SHARED_EVERY, "keep_last": 0}
        manner |= {"local_dir": str(self.local_dir), **settings}
        where = {"node": f"n{self.rank}", "report": self.told.append}
        return live(self.rank, self.case, self.folder, self.losses, end, **where, **manner)

    def on_rank_0(self, action):
        if self.rank == 0:
            action()
        gather(None)

    @property
    def shared(self):
        return list_steps(self.folder / "checkpoints")

    @property
    def own(self):
        """Steps on this rank's node."""
        (folder,) = self.local_dir.glob(f"*/n{self.rank}")
        return list_steps(folder)


def expect(run, whole, expected, state):
    assert run.losses.rows == whole.rows and len(whole.rows) == NUM_STEPS and state == expected


def go_on(rank, case, folder, asynchronous):
    """Lines that were told, of the run whose nodes stay and of the one that loses a node."""
    initialize_communication()
    whole = Losses()
    _, expected = live(rank, case, folder / "whole", whole, "its end", asynchronous=False)
    kept, lost = (Run(rank, case, folder / name) for name in ("kept", "lost"))
    for run in (kept, lost):
        assert run.live("death", asynchronous=asynchronous) == (0, "")
        gather(None)
        assert (run.shared, run.own) == ([1], [2])
        gather(None)
    lost.on_rank_0(lambda: [shutil.rmtree(folder) for folder in lost.local_dir.glob("*/n1")])
    for run, begins in ((kept, 2), (lost, 1)):
        run.told.clear()
        step, state = run.live("its end", asynchronous=asynchronous)
        assert step == begins
        expect(run, whole, expected, state)
        gather(None)
        assert run.own == [NUM_STEPS]
    # 2 was brought, of 3 to 5 the first and the third are shared; of 2 to 5 these, and the last at the end
    assert kept.shared == [1, 2, 3, 5] and lost.shared == [1, 2, 4, 5]
    return kept.told, lost.told


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "asynchronous"), [(CASES[0], True), (CASES[1], False), (CASES[2], True)])
def test_a_run_goes_on_from_its_nodes_and_where_one_is_lost_from_what_is_shared(case, asynchronous, tmp_path):
    kept, lost = run_distributed(go_on, 2, case, tmp_path, asynchronous, timeout_seconds=500)[0]
    assert [line for line in kept if "skipped" in line] == []
    assert f"resumed from {tmp_path / 'kept/checkpoints/step-00000002'}" in kept
    (line,) = [line for line in lost if "skipped" in line]
    assert line.startswith("checkpoint step-00000002 on the nodes is not whole and is skipped: ")
    assert "was written on n1 and is not on n0, n1" in line
    assert f"resumed from {tmp_path / 'lost/checkpoints/step-00000001'}" in lost


def fail_and_begin_anew(rank, folder):
    """What is told where a node's disk fails, where the shared one fails, and where a run begins anew."""
    initialize_communication()
    case, found = Case(dp=2, zero=1), {}
    failing = Run(rank, case, folder / "failing")
    failing.live("death", asynchronous=True)
    gather(None)
    # a file in the place of the folder of node n1
    if rank == 1:
        (own,) = failing.local_dir.glob("*/n1")
        shutil.rmtree(own)
        own.write_text("")
    gather(None)
    with pytest.raises(CheckpointError) as caught:
        failing.live("its end")
    found["no folder"] = str(caught.value)

    anew = Run(rank, case, folder / "anew")
    anew.live("death", asynchronous=False)
    gather(None)
    step, _ = anew.live("its end", resume=False, shared_every_saves=1)
    found["anew"] = step, anew.shared
    gather(None)
    folders = sorted(path.name for path in anew.local_dir.iterdir() if any(path.iterdir()))
    found["folders"] = len(folders)
    anew.on_rank_0(lambda: shutil.rmtree(anew.folder))
    step, _ = anew.live("death", asynchronous=False)
    found["removed"] = step
    return found


@pytest.mark.timeout(600)
def test_a_folder_that_cannot_be_written_is_refused_and_a_run_that_begins_anew_takes_nothing_old(tmp_path):
    for found in run_distributed(fail_and_begin_anew, 2, tmp_path, timeout_seconds=500):
        assert found["no folder"].startswith("rank 1: checkpoint.local_dir: ")
        assert "n1 cannot be written: " in found["no folder"]
        assert found["anew"] == (0, list(range(1, NUM_STEPS + 1)))
        assert found["folders"] == 1 and found["removed"] == 0


def save_with_a_full_node(rank, folder):
    initialize_communication()
    run = Run(rank, Case(dp=2, zero=1), folder / "run")
    write = local.write_pieces

    def fail(aside, pieces, rank):
        if "n1" in aside.parts:
            raise OSError(28, "No space left on device", str(aside))
        return write(aside, pieces, rank)

    local.write_pieces = fail
    run.live("its end")
    return run.told, run.shared


def test_where_a_node_s_disk_is_full_saves_go_to_the_shared_folder_at_once(tmp_path):
    for told, shared in run_distributed(save_with_a_full_node, 2, tmp_path):
        assert shared == list(range(1, NUM_STEPS + 1))
        lines = [line for line in told if "was not saved on the nodes" in line]
        assert len(lines) == NUM_STEPS and all("No space left on device" in line for line in lines)
        assert all(line.endswith(f"; it goes to {tmp_path / 'run/checkpoints'} at once") for line in lines)
