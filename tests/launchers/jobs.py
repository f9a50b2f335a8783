"""Real commands in processes of their own, watched, and ended with all that they started."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil
import torch

from tests.ports import reserve_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PRETRAIN = str(ROOT / "launchers" / "pretrain.py")
LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
LEAVING_SECONDS = 10
MARK = "MEGALITE_TEST_JOB"
TIMED = {"step_seconds", "tokens_per_second", "mfu", "save_stall_seconds"}


class Ended(NamedTuple):
    """How a job ended; `errors` are the lines on stderr that say so."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Job:
    """A command and all processes below it, in `with Job(...) as job:`; what is left at the end is killed."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        """Start in `folder`, which also receives the output of the command."""
        self.mark = uuid.uuid4().hex
        self.logs = [folder / f"{self.mark}.{name}" for name in ("stdout", "stderr")]
        with self.logs[0].open("w") as stdout, self.logs[1].open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=user_environment() | environment | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    def wait(self, seconds: float) -> Ended:
        """The end of the command, which must come in so many seconds."""
        returncode = self.process.wait(seconds)
        return Ended(returncode, *(log.read_text() for log in self.logs))

    def ranks(self, rank: int) -> list[psutil.Process]:
        """The processes of a rank that run: itself, then those that were forked by it."""
        ranks = [p for p in self.processes() if _environment(p).get("RANK") == str(rank)]
        return sorted(ranks, key=lambda process: process.create_time())

    def leftovers(self) -> list[psutil.Process]:
        """What still runs of a job that has ended; what was told to end has a moment to do so."""
        _, alive = psutil.wait_procs(self.processes(), timeout=LEAVING_SECONDS)
        return [process for process in alive if process in self.processes()]  # none that is only unburied

    def processes(self) -> list[psutil.Process]:
        """Processes of this job that still run, grandchildren and orphans included."""
        return [process for process in psutil.process_iter() if _environment(process).get(MARK) == self.mark]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()
        if error is not None:
            print(*(log.read_text() for log in self.logs), sep="\n")  # pytest shows it with the failure


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # it has just ended, or is another user's
        return {}


def user_environment() -> dict[str, str]:
    """What a user's shell has: this environment, nothing of a launcher, one thread a process."""
    names = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    cpu = {"DS_ACCELERATOR": "cpu"} if torch.cuda.is_available() else {}  # else it is for us to find out
    return names | cpu | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def deepspeed(num_ranks: int, *arguments: str, script: str = PRETRAIN) -> list[str]:
    """The project's main command, on a port of its own. script: in place of the launcher."""
    port = str(reserve_port())
    return ["deepspeed", "--num_gpus", str(num_ranks), "--master_port", port, script, *arguments]


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what no two runs share."""
    return {name: value for name, value in row.items() if name not in TIMED}


def wait_for(condition: Callable[[], Any], seconds: float, job: Job) -> None:
    """Wait until something is so, while the job runs."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert job.process.poll() is None, f"the job ended before: {job.wait(1)}"
        assert time.monotonic() < give_up_at, f"not so after {seconds} seconds: {job.logs[1].read_text()}"
        time.sleep(0.02)
