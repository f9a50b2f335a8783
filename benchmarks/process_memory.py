"""Peak memory of a command and all the processes it starts (Linux)."""

import subprocess
import time
from pathlib import Path

import psutil


def peak_bytes(command: list[str], *, cwd: Path) -> int:
    """Run a command; the sum of the peaks of all its processes. Raises RuntimeError when it fails.

    Each process keeps its own peak, so looking now and then misses only the last moment of each.
    """
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            for member in tree:
                if found := _peak(member.pid):  # the last one: before exec a child shows its parent's
                    peaks[member.pid] = found
            time.sleep(0.05)
        errors = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{command[1]} failed: {errors[-500:]}")
    return sum(peaks.values())


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
