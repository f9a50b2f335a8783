"""Worlds of processes that take turns: while one computes, the others wait."""

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from benchmarks.world import in_world

PATIENCE = timedelta(minutes=10)  # for what others do in their turns
HOST, FAILED = "127.0.0.1", "failed"
Act = Callable[[], Any]


def in_turns(size: int, bodies: Mapping[str, Callable[[], Act]], rounds: int) -> dict[str, list[list[Any]]]:
    """For each body, made by its function on `size` ranks of processes of its own, what it returns.

    A list for each rank, of one result per round. A body is made in a turn too.
    """
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    with ThreadPoolExecutor(len(bodies)) as threads:
        worlds = {
            name: threads.submit(
                in_world, size, partial(_take_turns, store.port, at, len(bodies), make, rounds)
            )
            for at, (name, make) in enumerate(bodies.items())
        }
        done, left = wait(worlds.values(), return_when=FIRST_EXCEPTION)
        if left:  # somebody failed: those that wait for their turn are to leave
            for turn in range(len(bodies) * (rounds + 1)):
                store.set(_key(turn), FAILED)
        for world in (*done, *left):
            world.result()
        return {name: world.result() for name, world in worlds.items()}


def _take_turns(port: int, at: int, num_bodies: int, make: Callable[[], Act], rounds: int) -> list[Any]:
    store = dist.TCPStore(HOST, port, is_master=False, timeout=PATIENCE)
    results: list[Any] = []
    act = make
    for number in range(rounds + 1):
        turn = number * num_bodies + at
        if turn and store.get(_key(turn)) == FAILED.encode():  # waits for it
            raise RuntimeError("another world failed: see its own error")
        results.append(act())
        act = results[0]
        dist.barrier()
        if dist.get_rank() == 0:
            store.set(_key(turn + 1), "")
    return results[1:]


def _key(turn: int) -> str:
    return f"turn {turn}"
