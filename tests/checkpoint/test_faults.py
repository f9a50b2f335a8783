"""After every single file operation of a save the newest checkpoint is complete, and its numbers are right.

Each operation in turn fails, or is the one before which the process dies, or the power: then the disk lacks
what was not synced, with and without the names that were not. Processes really die.
"""

import errno
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.checkpoint.format import CheckpointError, Piece, list_steps
from megalite.checkpoint.load import find_checkpoint, read_state, read_tensor
from megalite.checkpoint.local import NodeDisk, bring, carry, find_freight, save_locally
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.save import save_checkpoint
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Capture, Checkpoints
from megalite.training.saving import Saving
from tests.chaos.operations import KINDS, Operation, watched
from tests.chaos.power import Journal, cut_contents, cut_names
from tests.checkpoint.worlds import cut_all, even_cut, run_world
from tests.trainers import Case, deepspeed_config, run_config

FULL = torch.arange(1, 25, dtype=torch.float32).reshape(6, 4)
KEEP_LAST = 2
Key = tuple[str, str, int]  # of an operation: its kind, the file, and how manieth of that kind there
Save = Callable[[Path, int], None]


def pieces_of(step: int, world_size: int = 1) -> list[list[Piece]]:
    """The pieces of each rank; each number tells of which step it is."""
    tensors = {("weight", "w"): step * FULL, ("exp_avg", "w"): -step * FULL}
    return cut_all(tensors, lambda name, _: even_cut(0, tp_size=world_size))


def save_at_once(run_dir: Path, step: int) -> None:
    """Two ranks, threads of this process."""
    ranks = pieces_of(step, world_size=2)

    def save(rank: int, gather: Any) -> Path:
        keep = Retention(KEEP_LAST)
        options: dict[str, Any] = {"rank": rank, "world_size": 2, "gather": gather, "retention": keep}
        root, files = run_dir / "checkpoints", {"config.yaml": "a: 1\n"}
        return save_checkpoint(root, step, ranks[rank], {"step": step}, files, **options)

    errors = [result for result in run_world(2, save) if isinstance(result, Exception)]
    if errors:
        raise errors[0]


class Numbers(Checkpoints):
    """Checkpoints of a run without an engine."""

    def capture(self, engine: Any, step: int, standing: Any = None) -> Capture:
        return Capture(step, pieces_of(step)[0], {"step": step})


def save_beside(run_dir: Path, step: int, disk: NodeDisk | None = None) -> None:
    """One rank, with the thread of the asynchronous save; OSErrors come as they would in training."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = CheckpointConfig(asynchronous=True, keep_last=KEEP_LAST, on_failure="stop")
    run = run_config(Case(), output_dir=str(run_dir), checkpoint=settings)
    silent = lambda text: None  # noqa: E731
    checkpoints = Numbers(run, deepspeed_config(Case()), 0, silent, disk=disk)
    saving = Saving(checkpoints, settings, silent)
    saving.save(None, step)
    saving.finish()


def save_on_node(run_dir: Path, step: int) -> None:
    """The same, on the node's own disk first."""
    save_beside(run_dir, step, NodeDisk(run_dir / "local/n0", ("n0",), 0))


def save_on_nodes(run_dir: Path, step: int) -> None:
    """Two ranks, threads of this process, each on a node of its own."""
    ranks = pieces_of(step, world_size=2)

    def save(rank: int, gather: Any) -> Path:
        disk, root = NodeDisk(run_dir / f"local/n{rank}", ("n0", "n1"), rank), run_dir / "checkpoints"
        save_locally(disk, step, ranks[rank], {"step": step}, {"config.yaml": "a: 1\n"}, gather=gather)
        freight = find_freight(disk, step, gather=gather)
        return carry(disk, freight, root, gather=gather, retention=Retention(KEEP_LAST))

    errors = [result for result in run_world(2, save) if isinstance(result, Exception)]
    if errors:
        raise errors[0]


SAVES = {"at once": save_at_once, "beside": save_beside, "on its node": save_on_node}


class Fault:
    """Does something before one operation; `met` are the operations that came."""

    def __init__(self, run_dir: Path, key: Key | None, act: Callable[[Operation], None]) -> None:
        self._run_dir, self._key, self._act = run_dir, key, act
        self._counts: Counter[tuple[str, str]] = Counter()
        self.met: list[Key] = []

    def __call__(self, operation: Operation) -> None:
        where = operation.kind, str(operation.path.relative_to(self._run_dir))
        self._counts[where] += 1
        self.met.append((*where, self._counts[where]))
        if self.met[-1] == self._key:
            self._act(operation)


def operations_of(save: Save, run_dir: Path, step: int) -> list[Key]:
    fault = Fault(run_dir, None, lambda operation: None)
    with watched(run_dir, fault):
        save(run_dir, step)
    return fault.met


def in_a_child(body: Callable[[], Any]) -> int:
    """How a forked process that runs the body ends: 0, or minus the signal that killed it."""
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(300)  # all operations in turn, where other work may hold the cores
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def check(run_dir: Path) -> int:
    """The step of the newest checkpoint, of right numbers; all that have such a name are whole."""
    for folder in (run_dir / "checkpoints").glob("step-????????"):
        assert find_checkpoint(folder) == folder
    found = find_checkpoint(run_dir, report=pytest.fail)
    assert found is not None
    step = read_state(found)["step"]
    assert read_tensor(found, "weight", "w").equal(step * FULL)
    assert read_tensor(found, "exp_avg", "w").equal(-step * FULL)
    return step


def newest(run_dir: Path, num_nodes: int) -> int:
    """The step with which a run goes on that has so many nodes with disks of their own."""
    nodes = tuple(f"n{node}" for node in range(num_nodes))

    def look(rank: int, gather: Any) -> Path | None:
        disk = NodeDisk(run_dir / "local" / nodes[rank], nodes, rank)
        shared = gather(list_steps(run_dir / "checkpoints")[-1])[0]
        return bring(disk, range(shared + 1, 100), run_dir / "checkpoints", lambda text: None, gather=gather)

    results = run_world(num_nodes, look)
    assert all(not isinstance(result, Exception) for result in results), results
    return check(run_dir)


def die_at(save: Save, run_dir: Path, step: int, key: Key, journal: Path) -> None:
    """A process that saves dies before the operation, with half of it done where that can be."""

    def act(operation: Operation) -> None:
        operation.half()
        os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        fault, kept = Fault(run_dir, key, act), Journal(journal)

        def before(operation: Operation) -> None:
            kept.before(operation)
            fault(operation)

        with watched(run_dir, before, kept.after):
            save(run_dir, step)

    assert in_a_child(body) == -signal.SIGKILL, key


def counted(save: Save, run_dir: Path, step: int) -> list[Key]:
    """What a save does, in a process of its own."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    assert in_a_child(lambda: writer.send(operations_of(save, run_dir, step))) == 0
    return reader.recv()


def check_next_save(save: Save, run_dir: Path) -> None:
    """It clears what is left."""
    save(run_dir, 4)
    assert check(run_dir) == 4 and list_steps(run_dir / "checkpoints")[-1] == 4
    assert not list(run_dir.rglob("*.tmp"))


def copy_of_begun(tmp_path: Path, name: str) -> Path:
    """The run folder tmp_path/begun once more, by another name."""
    return Path(shutil.copytree(tmp_path / "begun", tmp_path / name))


@pytest.fixture(params=SAVES)
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Save, Callable[[str], Path], list[Key]]:
    """A way to save, a maker of run folders with steps 1 and 2 saved, and what a save of step 3 does."""
    save = SAVES[request.param]
    for step in (1, 2):
        assert in_a_child(lambda step=step: save(tmp_path / "begun", step)) == 0

    run_dir = partial(copy_of_begun, tmp_path)
    keys = counted(save, run_dir("counted"), 3)
    assert check(tmp_path / "counted") == 3 and list_steps(tmp_path / "counted/checkpoints") == [2, 3]
    assert {kind for kind, _, _ in keys} == set(KINDS) and len(keys) > 20
    return save, run_dir, keys


def test_death_or_a_power_cut_at_any_operation_leaves_a_complete_checkpoint(begun, tmp_path):
    save, new_run_dir, keys = begun

    steps, resumed = [], []
    for number, key in enumerate(keys):
        run_dir, journal = new_run_dir(f"death-{number}"), tmp_path / f"journal-{number}"
        die_at(save, run_dir, 3, key, journal)
        steps.append(check(run_dir))
        cut_contents(run_dir, [journal], ("truncated", "zeros", "empty")[number % 3])
        assert check(run_dir) == steps[-1], key  # a name that is there is that of something whole
        cut_names([journal])
        assert check(run_dir) in (2, 3), key
        resumed.append(newest(run_dir, 1))
    # of one save's operations each thread's come in their order: the rename, alone, makes the difference
    renames = [i for i, (kind, path, _) in enumerate(keys) if kind == "rename" and "00000003.tmp" in path]
    published = renames[-1]
    assert steps == [2] * (published + 1) + [3] * (len(keys) - published - 1)
    assert 20 < published < len(keys) - 5
    if save is save_on_node:  # there it is whole before it is shared, once its name is synced
        assert len(renames) == 2 and renames[0] < published - 20
        assert resumed[: renames[0] + 1] == [2] * (renames[0] + 1)
        assert resumed[renames[0] + 2 :] == [3] * (len(keys) - renames[0] - 2)
    for number in range(0, len(keys), 8):
        assert in_a_child(lambda n=number: check_next_save(save, tmp_path / f"death-{n}")) == 0


def test_an_error_of_any_operation_leaves_a_complete_checkpoint_and_the_next_save_succeeds(begun):
    save, new_run_dir, keys = begun

    def fail(operation: Operation) -> None:
        operation.half()
        number = errno.ENOSPC if operation.kind in ("write", "open", "mkdir") else errno.EIO
        raise OSError(number, os.strerror(number), str(operation.path))

    def fail_at_each() -> None:
        num_failed = 0
        for number, key in enumerate(keys):
            run_dir = new_run_dir(f"error-{number}")
            fault = Fault(run_dir, key, fail)
            with watched(run_dir, fault):
                try:
                    save(run_dir, 3)
                except CheckpointError as error:
                    num_failed += 1
                    told = ("step-00000003 was not saved: ", "step-00000003 was not carried from the nodes: ")
                    assert any(text in str(error) for text in told), key
            assert key in fault.met
            assert check(run_dir) in (2, 3), key
            check_next_save(save, run_dir)
        # one that only removes an old checkpoint costs nothing; where the node's disk fails the other serves
        assert (15 if save is save_on_node else 20) < num_failed < len(keys)

    assert in_a_child(fail_at_each) == 0


def test_death_or_a_power_cut_among_two_nodes_loses_nothing_that_both_have(tmp_path):
    for step in (1, 2):
        assert in_a_child(lambda step=step: save_on_nodes(tmp_path / "begun", step)) == 0
    copy = partial(copy_of_begun, tmp_path)
    keys = counted(save_on_nodes, copy("counted"), 3)
    found = {}
    for number, key in enumerate(keys):
        run_dir, journal = copy(f"death-{number}"), tmp_path / f"journal-{number}"
        die_at(save_on_nodes, run_dir, 3, key, journal)
        cut_contents(run_dir, [journal], ("truncated", "zeros", "empty")[number % 3])
        cut_names([journal])
        found[key] = newest(run_dir, 2)
    carrying = [step for (_, path, _), step in found.items() if path.startswith("checkpoints")]
    writing = [step for (_, path, _), step in found.items() if "00000003.tmp" in path and "local" in path]
    assert set(carrying) == {3} and len(carrying) > 20
    assert set(writing) == {2} and len(writing) > 10
    assert set(found.values()) == {2, 3}


def test_a_step_that_is_saved_again_has_a_whole_checkpoint_after_each_operation(tmp_path):
    for step in (1, 2):
        assert in_a_child(lambda step=step: save_at_once(tmp_path / "begun", step)) == 0
    copy = partial(copy_of_begun, tmp_path)
    keys = counted(save_at_once, copy("counted"), 2)
    exchanges = [i for i, (kind, path, _) in enumerate(keys) if kind == "rename" and "00000002" in path]
    assert len(exchanges) == 3  # the old one's, the new one's, the old one's burial
    for number, key in enumerate(keys):
        run_dir, journal = copy(f"death-{number}"), tmp_path / f"journal-{number}"
        die_at(save_at_once, run_dir, 2, key, journal)
        assert check(run_dir) == 2, key
        cut_contents(run_dir, [journal], ("truncated", "zeros", "empty")[number % 3])
        cut_names([journal])
        assert check(run_dir) == 2, key
        if number in exchanges:
            assert in_a_child(lambda r=run_dir: save_at_once(r, 3)) == 0
            assert list_steps(run_dir / "checkpoints") == [2, 3] and check(run_dir) == 3
            assert len(list((run_dir / "checkpoints").iterdir())) == 2
