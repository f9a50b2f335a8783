"""One life of a tiny run: real training on forked ranks, from its newest checkpoint until it ends.

What DeepSpeed's launcher and the watch over the ranks do in a job is done here by the parent: when a rank
is dead, the others are ended.
"""

import faulthandler
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.batch import Batch
from megalite.checkpoint.format import CheckpointError
from megalite.config.run import RunConfig
from megalite.exit_status import FINISHED, STOPPED, STORAGE
from megalite.measure.metrics import Metrics, Workload
from megalite.measure.progress import Progress
from megalite.parallel.context import ParallelContext
from megalite.training.checkpoints import Checkpoints, find_newest
from megalite.training.course import Course
from megalite.training.data import Data
from megalite.training.engine import initialize_communication
from megalite.training.guard import Guard
from megalite.training.loop import train
from megalite.training.saving import Saving
from megalite.training.stopping import Signals, Stopping
from megalite.training.trainer import StageTrainer, build_context
from megalite.watch.marks import Marks
from tests.chaos.faults import Fault, Trap
from tests.chaos.operations import Operation, watched
from tests.chaos.power import Journal
from tests.trainers import BATCH, SEQ_LENGTH, Case, deepspeed_of, global_batch

MOST_SECONDS = 240  # a life takes about two where nothing else runs
NUM_MICRO_BATCHES = 2
REFUSED, FAILED = 3, 1  # ends that megalite's own exit statuses do not name here
STOPPED_SECONDS = 0.3  # how long a stopped rank stands before the job is ended


@dataclass(frozen=True)
class Life:
    """How a life ended.

    statuses: of each rank: its exit status, minus a signal, None where it had to be ended for another's.
    resumed_from: a step, 0 for none, None where it did not come so far.
    skipped: the names of checkpoints that were reported as damaged.
    has_met: whether the fault came.
    """

    statuses: list[int | None]
    resumed_from: int | None
    skipped: list[str]
    has_met: bool
    log: str


class Samples:
    """The batch of each step by the samples before it, as the data's own loaders give it."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def batch(self, consumed_samples: int) -> list[Batch]:
        data = self._context["dp"]
        own = global_batch(1 + consumed_samples // BATCH).split(data.size)[data.rank]
        return own.split(NUM_MICRO_BATCHES)


def live(case: Case, run: RunConfig, fault: Fault | None, folder: Path, write_seconds: float = 0.0) -> Life:
    """Start the ranks and see them to their end.

    folder: an empty one, for what they leave beside the run. write_seconds: of each write, at least.
    """
    started_at = time.monotonic()
    begin = partial(_rank_main, case, run, fault, folder, write_seconds)
    pids = [_fork(partial(begin, rank)) for rank in range(case.world_size)]
    statuses = _watch(pids, fault, started_at, folder)
    log = "".join(file.read_text(errors="replace") for file in sorted(folder.glob("log-*")))
    resumed = re.search(r"begins after step (\d+)", log)
    return Life(
        statuses,
        int(resumed[1]) if resumed else None,
        re.findall(r"checkpoint (step-\d+) is not valid and is skipped", log),
        (folder / "met").exists(),
        log,
    )


def _fork(body: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        status = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(pids: list[int], fault: Fault | None, started_at: float, folder: Path) -> list[int | None]:
    """Wait for all; do what the fault does from outside; end the others once one is dead or stopped."""
    statuses: dict[int, int] = {}
    end_at, moment = started_at + MOST_SECONDS, _Moment(fault, started_at, folder)
    while len(statuses) < len(pids):
        running = [pid for pid in pids if pid not in statuses]
        for pid in running:
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if not found:
                continue
            patience = fault.patience_seconds if fault and not fault.ends_all else 0.0
            if os.WIFSTOPPED(status):
                end_at = min(end_at, time.monotonic() + STOPPED_SECONDS)
                continue
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] not in (FINISHED, STOPPED, STORAGE):
                end_at = min(end_at, time.monotonic() + patience)
        moment.come(pids, statuses)
        if time.monotonic() >= end_at:
            if time.monotonic() >= started_at + MOST_SECONDS:
                (folder / "hung").touch()
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    return [statuses.get(pid) for pid in pids]


class _Moment:
    """What a fault does from outside, some time after the start."""

    def __init__(self, fault: Fault | None, started_at: float, folder: Path) -> None:
        self._fault, self._met = fault, folder / "met"
        self._at = started_at + (fault.seconds if fault else 0)

    def come(self, pids: list[int], ended: dict[int, int]) -> None:
        """Now, if it is time, and the rank still runs."""
        fault = self._fault
        if fault is None or self._met.exists() or time.monotonic() < self._at or pids[fault.rank] in ended:
            return
        kinds = {"kill one at a moment": signal.SIGKILL, "kill all at a moment": signal.SIGKILL}
        kinds |= {"stop at a moment": signal.SIGSTOP, "signal": signal.Signals(fault.signal)}
        if fault.kind not in kinds or (fault.kind == "signal" and not self._met.with_name("ready").exists()):
            return
        self._met.touch()
        for pid in pids if fault.ends_all else pids[fault.rank : fault.rank + 1]:
            if pid not in ended:
                os.kill(pid, kinds[fault.kind])


def _rank_main(
    case: Case, run: RunConfig, fault: Fault | None, folder: Path, write_seconds: float, rank: int
) -> int:
    """A rank from its first line to its exit status."""
    descriptor = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)  # pytest's own are not the process's
    faulthandler.dump_traceback_later(MOST_SECONDS - 20, exit=True, file=sys.stderr)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.world_size)}
    signals = Signals()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=case.world_size,
        timeout=timedelta(seconds=MOST_SECONDS),
    )
    trap = None
    if fault is not None and fault.rank == rank:
        trap = Trap(fault, (folder / "met").touch)
    root = Path(run.output_dir) / "checkpoints"
    journal = Journal(folder / f"journal-{rank}")

    def before(operation: Operation) -> None:
        journal.before(operation)
        if operation.kind == "write":
            time.sleep(write_seconds)
        if trap is not None:
            trap(operation)

    with watched(root, before, journal.after):
        return _train(rank, case, run, signals, folder)


def _train(rank: int, case: Case, run: RunConfig, signals: Signals, folder: Path) -> int:
    """As megalite.training.job does it, with samples and numbers of its own."""
    initialize_communication()
    report = print if rank == 0 else lambda text: None
    deepspeed = deepspeed_of(case, NUM_MICRO_BATCHES)
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    stopping = Stopping(Path(run.output_dir), None, signals, context.device, time.monotonic())
    try:
        newest = find_newest(run, rank, report)
    except CheckpointError as error:
        report(f"error: {error}")
        return REFUSED
    course = Course.after(newest.state, deepspeed.train_batch_size)
    trainer = StageTrainer(run, deepspeed, context)
    checkpoints = Checkpoints(run, deepspeed, rank, report, {}, newest)
    last_step = checkpoints.resume(trainer.engine)
    report(f"begins after step {last_step}")
    metrics = _open_metrics(run, last_step) if rank == 0 else None
    saving = Saving(checkpoints, run.checkpoint, report)
    guard = Guard(run.guard, report)
    guard.restore(newest.state.get("guard", {}))
    (folder / "ready").touch()
    data = Data(Samples(context), None, {})
    try:
        request = train(trainer, data, run, course, guard, saving, stopping, metrics, mark=Marks("start-up"))
        failure = saving.failure
    except CheckpointError as error:
        request, failure = None, error
    if metrics:
        metrics.close()
    report(f"ends with {request} and {failure}")
    if failure is not None:
        return STORAGE
    return FINISHED if request is None else STOPPED


def _open_metrics(run: RunConfig, last_step: int) -> Metrics:
    workload = Workload(BATCH, SEQ_LENGTH, flops_per_token=1.0, peak_flops_per_second=1.0)
    progress = Progress(run.schedule.num_steps, last_step=last_step, bar=False)
    return Metrics(Path(run.output_dir), workload, progress, last_step=last_step, tensorboard=False)


def read_losses(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics, without what time makes of them."""
    names = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: row[name] for name in names} for row in map(json.loads, lines)]
