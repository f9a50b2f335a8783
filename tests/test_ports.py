"""A port that a test is given is its own, and free."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ports
from tests.ports import candidates, reserve_port

ROOT = Path(__file__).parent.parent


def test_every_port_is_free_and_given_once():
    given = [reserve_port() for _ in range(20)]
    assert len(set(given)) == 20 and set(given) <= set(candidates())
    for port in given:
        socket.create_server(("127.0.0.1", port)).close()


def test_the_kernel_gives_none_of_them_away():
    low, high = map(int, ports.KERNELS_RANGE.read_text().split())
    assert not [port for port in candidates() if low <= port <= high]
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] not in candidates()


def test_a_port_that_another_process_was_given_or_uses_is_not_given(monkeypatch):
    mine = reserve_port()
    other = f"from tests import ports; ports.candidates = lambda: [{mine}]; ports.reserve_port()"
    done = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True)
    assert f"no port from {mine} to {mine} is free" in done.stderr
    with socket.create_server(("", 0)) as server:
        monkeypatch.setattr(ports, "candidates", lambda: [server.getsockname()[1]])
        with pytest.raises(RuntimeError, match="is free"):
            reserve_port()
