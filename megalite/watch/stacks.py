"""What the threads of a process execute, in Python and below it: of this one, or of another of this node.

A process that is stopped, or whose main thread holds Python's lock in native code, cannot describe itself. Of
the first the kernel and a debugger know something. The second writes its Python stacks in a signal handler,
which needs no lock, into a file in memory that others of the node can open (`DUMP_SIGNAL`, `Process`).
"""

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

PACKAGE = str(Path(__file__).parents[1]) + os.sep
DUMP_SIGNAL = signal.SIGUSR2
DUMP_NAME = "megalite-stacks"
DUMP_SECONDS = 0.5  # in which the handler has written
NATIVE_SECONDS = 45.0  # for a debugger, which reads the symbols of large libraries
WRITE_SECONDS = NATIVE_SECONDS + 15.0  # for all stacks of a process
DEBUGGERS = (  # the first that is installed; {pid} is the process
    ("py-spy", "dump", "--native", "--pid", "{pid}"),
    ("eu-stack", "-p", "{pid}"),
    ("gdb", "-p", "{pid}", "-nx", "-batch", "-ex", "thread apply all backtrace"),
)
STATES = {
    "T": "is stopped (SIGSTOP)",
    "t": "is held by a debugger",
    "D": "waits in the kernel, where no signal reaches it",
}
BUSY = "does not answer (native code holds Python's lock)"
FROZEN = "does not answer (it, its node or the network is frozen)"
TASK_FILES = ("wchan", "syscall", "stack")  # where in the kernel; the last for root alone


@dataclass(frozen=True)
class Process:
    """A process of a node, as another one there finds it. dump_fd: its file in memory, -1 for none."""

    pid: int
    node: str
    dump_fd: int = -1

    @classmethod
    def own(cls) -> "Process":
        """This process; from now on it dumps its Python stacks at DUMP_SIGNAL."""
        if not hasattr(os, "memfd_create"):
            return cls(os.getpid(), _node())
        dump_fd = os.memfd_create(DUMP_NAME)
        faulthandler.register(DUMP_SIGNAL, file=dump_fd, all_threads=True)
        return cls(os.getpid(), _node(), dump_fd)

    def as_message(self) -> dict[str, Any]:
        """What makes the same process elsewhere, as keyword arguments."""
        return asdict(self)


def _node() -> str:
    """The same for processes that see each other; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def main_frames() -> Iterator[FrameType]:
    """The frames of this process's main thread, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def describe(frames: Sequence[FrameType]) -> str:
    """Where these frames are, the innermost first, and where in megalite that was called."""
    ours = [frame for frame in frames if frame.f_code.co_filename.startswith(PACKAGE)]
    told = dict.fromkeys([*frames[:1], *ours[:1]])
    return " from ".join(_function_file_line(frame) for frame in told) or "no Python code"


def _function_file_line(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def write_own_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads of this process; an OSError says what kept it from that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        print(f"{title}\n\nPython", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
        _write_native(file, os.getpid())


def write_stacks_of(process: Process, path: Path, title: str) -> str:
    """Write those of another process of this node; its state, in words. OSError as above."""
    state = state_of(process.pid)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        print(f"{title}\n{state}", file=file, flush=True)
        if state == BUSY:
            print(f"\nPython\n{_dump_of(process)}", file=file, flush=True)
        _write_native(file, process.pid)
    return state


def state_of(pid: int) -> str:
    """What a process of this node does that does not answer."""
    status = Path(f"/proc/{pid}/status").read_text()
    letter = status.partition("State:")[2].split()[0]
    return STATES.get(letter, BUSY)


def _dump_of(process: Process) -> str:
    """The Python stacks of a process that runs, by its handler; the signal goes to no other process."""
    dump = Path(f"/proc/{process.pid}/fd/{process.dump_fd}")
    if not dump.exists() or DUMP_NAME not in os.readlink(dump):
        return "not known"
    os.kill(process.pid, DUMP_SIGNAL)
    time.sleep(DUMP_SECONDS)
    return dump.read_text()


def _write_native(file: IO[str], pid: int) -> None:
    print("\nKernel", file=file)
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda task: int(task.name)):
        print(f"thread {task.name} {_read(task / 'comm')}", file=file)
        for name in TASK_FILES:
            print(f"  {name}: {_read(task / name)}", file=file)
    print("\nNative", file=file, flush=True)
    debugger = next((command for command in DEBUGGERS if shutil.which(command[0])), None)
    if debugger is None:
        print("not known: install py-spy, elfutils or gdb", file=file, flush=True)
        return
    command = [part.format(pid=pid) for part in debugger]
    try:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=NATIVE_SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"{command[0]} took more than {NATIVE_SECONDS:g} seconds", file=file, flush=True)


def _read(path: Path) -> str:
    """A file of the kernel about a thread, which may have ended, or may not be ours to read."""
    try:
        return path.read_text().strip()
    except OSError as error:
        return f"not known ({error.strerror})"
