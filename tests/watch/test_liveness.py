"""A job ends within seconds when one of its processes dies, however the others are blocked.

The processes are real. Each test compares all that was printed with the one line that should be there.
"""

import json
import os
import re
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist

from megalite.watch.liveness import Liveness, LivenessError
from tests.watch.ranks import ENDED, FINISHED, HOST, KILLED, wait_for, wait_in_c


def name(rank, process):
    return re.escape(f"rank {rank} ({socket.gethostname()}, pid {process.pid})")


def assert_names_the_dead(printed, running, rank):
    expected = f"error: {name(rank, running.processes[rank])} died without a message: .*\n"
    assert re.fullmatch(expected, printed), printed


# A process is killed.


@pytest.mark.parametrize("victim", [1, 2])
def test_a_killed_rank_is_named_and_ends_ranks_that_are_blocked_in_c(job, victim):
    running = job(3, wait_in_c)
    running.wait_until_all_are_ready()
    running.kill(victim)
    codes, printed = running.end()
    assert codes == [KILLED if rank == victim else ENDED for rank in range(3)]
    assert_names_the_dead(printed, running, victim)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_killed_rank_0_is_named_by_exactly_one_survivor(job, world_size):
    running = job(world_size, wait_in_c)
    running.wait_until_all_are_ready()
    running.kill(0)
    codes, printed = running.end()
    assert codes == [KILLED] + [ENDED] * (world_size - 1)
    assert_names_the_dead(printed, running, 0)


def all_reduce_without_rank_2(liveness, rank, folder):
    """Gloo notices the death too, and its error on a survivor must not be taken for the cause."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    (folder / f"connected-{rank}").touch()
    if rank == 2:
        wait_in_c()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        liveness.failed(f"consequence: {error}")


def test_a_rank_killed_during_a_gloo_all_reduce_is_the_one_that_is_named(job):
    running = job(3, all_reduce_without_rank_2)
    wait_for(lambda: len(list(running.folder.glob("connected-*"))) == 3)
    time.sleep(0.1)
    running.kill(2)
    codes, printed = running.end()
    assert codes == [ENDED, ENDED, KILLED]
    assert_names_the_dead(printed, running, 2)


def test_the_line_is_out_before_a_launcher_ends_the_survivors(job):
    """DeepSpeed's launcher looks once per second, and then sends SIGTERM to the others."""
    running = job(3, wait_in_c)
    running.wait_until_all_are_ready()
    running.kill(1)
    wait_for(lambda: (running.folder / "stderr").read_text().endswith("\n"), seconds=1.0)
    for survivor in (running.processes[0], running.processes[2]):
        survivor.terminate()
    _, printed = running.end()
    assert_names_the_dead(printed, running, 1)


def fork_a_worker_then_wait(liveness, rank, folder):
    wait_for(lambda: all((folder / f"ready-{rank}").exists() for rank in range(2)))
    time.sleep(0.1)  # so that rank 0 has let rank 1 in, and the worker inherits all sockets
    worker = os.fork()
    if worker == 0:
        wait_in_c()
    (folder / f"worker-{rank}").write_text(str(worker))
    wait_in_c()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_outlives_a_killed_rank_does_not_hide_its_death(job, victim):
    """A data loader's worker inherits the sockets of its parent by fork, and would keep them open."""
    running = job(2, fork_a_worker_then_wait)
    wait_for(lambda: all((running.folder / f"worker-{rank}").exists() for rank in range(2)))
    time.sleep(0.1)
    running.kill(victim)
    codes, printed = running.end()
    for rank in range(2):
        os.kill(int((running.folder / f"worker-{rank}").read_text()), signal.SIGKILL)
    assert sorted(codes) == sorted([KILLED, ENDED])
    assert printed.startswith(f"error: rank {victim} ")


# A process fails, and can say why.


def rank_1_raises(liveness, rank, folder):
    try:
        if rank == 1:
            raise ValueError("the data ends after 7 samples\nand a second line")
        wait_in_c()
    except ValueError as error:
        liveness.failed(str(error))


def test_a_rank_that_fails_is_named_with_its_reason(job):
    running = job(3, rank_1_raises)
    codes, printed = running.end()
    assert codes == [ENDED] * 3
    assert re.fullmatch(rf"error: {name(1, running.processes[1])}: the data ends after 7 samples\n", printed)


def all_ranks_fail(liveness, rank, folder):
    liveness.failed("8 heads cannot be shared by 3 ranks")


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_error_that_all_ranks_share_is_printed_once_and_names_none(job, world_size):
    codes, printed = job(world_size, all_ranks_fail).end()
    assert codes == [ENDED] * world_size
    assert printed == "error: 8 heads cannot be shared by 3 ranks\n"


def all_but_rank_0_fail(liveness, rank, folder):
    if rank:
        liveness.failed("no space left on device")
    wait_in_c()


def test_an_error_that_some_ranks_share_is_printed_once_and_names_the_first(job):
    codes, printed = job(4, all_but_rank_0_fail).end()
    assert codes == [ENDED] * 4
    assert re.fullmatch(r"error: rank [123] \(.*, pid \d+\) and 2 more: no space left on device\n", printed)


def rank_1_returns_without_goodbye(liveness, rank, folder):
    if rank != 1:
        wait_in_c()


def test_a_rank_that_just_leaves_counts_as_dead(job):
    codes, printed = job(3, rank_1_returns_without_goodbye).end()
    assert codes == [ENDED, FINISHED, ENDED]
    assert printed.startswith("error: rank 1 ") and printed.count("\n") == 1


# Nothing is wrong.


def close_one_after_the_other(liveness, rank, folder):
    time.sleep(0.2 * rank)
    liveness.close()


@pytest.mark.parametrize("world_size", [1, 4])
def test_an_orderly_end_prints_nothing_even_if_rank_0_is_done_first(job, world_size):
    codes, printed = job(world_size, close_one_after_the_other).end()
    assert codes == [FINISHED] * world_size
    assert printed == ""


def all_but_rank_2_close(liveness, rank, folder):
    if rank == 2:
        wait_in_c()
    liveness.close()


def test_a_rank_killed_after_the_others_said_goodbye_is_still_named(job):
    running = job(3, all_but_rank_2_close)
    running.wait_until_all_are_ready()
    running.processes[1].join(30)
    running.kill(2)
    codes, printed = running.end()
    assert codes == [ENDED, FINISHED, KILLED]
    assert printed.startswith("error: rank 2 ") and printed.count("\n") == 1


def strangers_call_then_all_close(liveness, rank, folder):
    address = json.loads((folder / "address").read_text())
    impostor = json.dumps({"hello": 1, "token": "guess", "name": "x"}).encode()
    for message in (b"GET / HTTP/1.1\r\n\r\n", impostor + b"\n", b'[1]\n"x"\n', b""):
        with socket.create_connection((HOST, address["port"])) as stranger:
            stranger.sendall(message)
    time.sleep(0.2)
    liveness.close()


def test_strangers_on_the_port_do_no_harm(job):
    codes, printed = job(2, strangers_call_then_all_close).end()
    assert codes == [FINISHED, FINISHED]
    assert printed == ""


# A process never comes.


def return_at_once(liveness, rank, folder):
    pass


def test_start_returns_only_when_all_ranks_are_there(job):
    """Nobody gets as far as to leave, so the death of rank 0 and 1 is not what is reported."""
    codes, printed = job(3, return_at_once, connect_seconds=1.5, num_absent=1).end()
    assert codes == [ENDED, ENDED]
    assert printed.startswith("error: rank 2 did not connect")


def test_ranks_that_never_connect_are_named(job):
    codes, printed = job(4, wait_in_c, connect_seconds=1.5, num_absent=2).end()
    assert codes == [ENDED, ENDED]
    assert printed == "error: ranks 2, 3 did not connect to rank 0 within 1.5 seconds\n"


def test_a_rank_0_that_cannot_be_reached_is_one_clear_line():
    with socket.socket() as mute:  # bound, so that nobody else takes the port, and not listening
        mute.bind((HOST, 0))
        port = mute.getsockname()[1]
        address = json.dumps({"host": HOST, "port": port, "token": "", "name": "rank 0"})
        expected = rf"rank 1 .* cannot reach rank 0 at {HOST}:{port} .*MASTER_ADDR"
        with pytest.raises(LivenessError, match=expected):
            Liveness.start(1, 2, lambda _: address, host=HOST)
