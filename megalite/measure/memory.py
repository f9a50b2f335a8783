"""How much memory this rank uses: of its GPU, or of the process on a CPU."""

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): VmHWM begins again with what there is now


def used_bytes(device: torch.device) -> int:
    """Now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most so far, or since `begin_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def begin_peak(device: torch.device) -> None:
    """Let the peak begin again with what is used now; where the system does not, it goes on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text(_RESET_PEAK)


def node_bytes() -> int:
    """Memory of this machine, or as much of it as the control group of this process may have."""
    return min([psutil.virtual_memory().total, *_limits()])


def _limits() -> Iterator[int]:
    """Of its control group and those around it, in both versions of cgroups."""
    groups = _CGROUP.read_text() if _CGROUP.exists() else ""
    for line, root, name in (
        (r"^0::/(.*)$", _CGROUPS, "memory.max"),
        (r"^\d+:memory:/(.*)$", _CGROUPS / "memory", "memory.limit_in_bytes"),
    ):
        own = re.search(line, groups, re.MULTILINE)
        folder = root / own[1] if own else root
        for place in (folder, *folder.parents):
            limit = place / name
            if place.is_relative_to(root) and limit.exists() and limit.read_text().strip().isdigit():
                yield int(limit.read_text())


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} has no {name}"
    return int(found[1]) * 1024


class SteadyPeak:
    """The peak of a run from its second step on: in the first the optimizer makes its state.

    Call `reached` with the number of each step that begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at_start_bytes = used_bytes(device)
        self._first: int | None = None
        self._is_steady = False

    def reached(self, step: int | None) -> None:
        """A step is under way, or none."""
        if step is None or self._is_steady:
            return
        self._first = step if self._first is None else self._first
        if step > self._first:
            self._is_steady = True
            begin_peak(self.device)

    @property
    def grown_bytes(self) -> int:
        """More than at the start, at the peak."""
        return peak_bytes(self.device) - self.at_start_bytes
