"""A real Slurm cluster of two nodes on one host, for tests; nothing is installed on the system.

Each cluster has its own folder, configuration, ports and daemons, and ends all that it started.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tests.ports import reserve_port

NODES = ("n1", "n2")
CPUS_PER_NODE = 2
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

# No munge, cgroup or systemd: the daemons run as the user of the tests, in any container.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=12
KillWait=5
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=10
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000"


class Job(NamedTuple):
    """How a job ended: `exit_code` is the batch script's, `log` its whole output."""

    state: str
    exit_code: int
    log: str


class Cluster:
    """Nodes n1 and n2 with two CPUs each and no GPU, up inside `with Cluster(root) as cluster:`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: spool folders hold sockets
        self.configuration = self.folder / "slurm.conf"
        self.libraries = next(root.glob("usr/lib/*-linux-gnu"))
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.of_nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables with which Slurm's commands find this cluster, over the environment of the tests."""
        return os.environ | {
            "SLURM_CONF": str(self.configuration),
            "PATH": f"{self.root}/usr/bin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{self.libraries}:{self.libraries}/slurm-wlm",
        }

    def __enter__(self) -> "Cluster":
        try:
            self._write_configuration()
            self._start("slurmctld", "-c")
            for node in NODES:
                self._start_node(node)
            wait_until(self._is_idle, 30, what=f"idle nodes\n{self._daemon_logs()}")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def command(self, *command: str, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands; return its output. A failure carries the command's own message."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, script: Path | str, *arguments: str, options: list[str], cwd: Path) -> int:
        """Submit a batch script from the folder `cwd`; return the job's id. Its log is for `wait`."""
        output = f"--output={self.folder}/job-%j.log"
        return int(self.command("sbatch", "--parsable", output, *options, str(script), *arguments, cwd=cwd))

    def log(self, job_id: int) -> str:
        """All that the job has printed so far."""
        path = self.folder / f"job-{job_id}.log"
        return path.read_text() if path.exists() else ""

    def is_finished(self, job_id: int) -> bool:
        """Whether the job has ended, well or badly."""
        return self._show(job_id)["JobState"] in FINISHED

    def wait(self, job_id: int, *, timeout_seconds: float) -> Job:
        """Wait for the job's end. A job that takes longer is cancelled; TimeoutError shows its log."""
        try:
            wait_until(lambda: self.is_finished(job_id), timeout_seconds, what=f"end of job {job_id}")
        except TimeoutError as error:
            self.command("scancel", str(job_id))
            raise TimeoutError(f"{error}; its log:\n{self.log(job_id)}") from None
        shown = self._show(job_id)
        return Job(shown["JobState"], int(shown["ExitCode"].partition(":")[0]), self.log(job_id))

    def ranks(self, job_id: int) -> dict[int, int]:
        """The process id of each rank that a job runs now: its first process with RANK set."""
        found: dict[int, int] = {}
        for pid, variables in sorted(self._processes()):
            if variables.get("SLURM_JOB_ID") == str(job_id) and "RANK" in variables:
                found.setdefault(int(variables["RANK"]), pid)
        return found

    def lose_node(self, node: str) -> None:
        """As if its power failed: its daemon is killed, its tasks answer nobody, nor say that they ended."""
        self.of_nodes[node].kill()
        for pid, variables in self._processes():
            if variables.get("SLURMD_NODENAME") == node:
                os.kill(pid, signal.SIGSTOP)

    def state_of_node(self, node: str) -> str:
        """As `sinfo` names it, such as idle or down*."""
        return self.command("sinfo", "-h", "-n", node, "-o", "%T").strip()

    def return_node(self, node: str) -> None:
        """A lost one, started again: nothing of before runs there."""
        for pid, variables in self._processes():
            if variables.get("SLURMD_NODENAME") == node:
                os.kill(pid, signal.SIGKILL)
        self._start_node(node)

    def _show(self, job_id: int) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "-o", str(job_id))))

    def _write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        controller_port, *node_ports = [reserve_port() for _ in range(1 + len(NODES))]
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=CPUS_PER_NODE)
            for name, port in zip(NODES, node_ports, strict=True)
        ]
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        text = CONFIGURATION.format(
            host=host,
            controller_port=controller_port,
            user=getpass.getuser(),
            plugins=self.libraries / "slurm-wlm",
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        self.configuration.write_text(text)

    def _start_node(self, node: str) -> None:
        stepd = str(self.root / "usr/sbin/slurmstepd-wlm")
        self.of_nodes[node] = self._start("slurmd", "-N", node, "-d", stepd)

    def _start(self, daemon: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(self.root / f"usr/sbin/{daemon}-wlm"), "-D", *arguments]
        with (self.folder / f"daemon-{len(self.daemons)}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.daemons.append(process)
        return process

    def _is_idle(self) -> bool:
        try:
            return self.command("sinfo", "-h", "-o", "%D %T").split() == [str(len(NODES)), "idle"]
        except RuntimeError:  # the controller does not answer yet
            return False

    def _daemon_logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("daemon-*.log")))

    def _stop(self) -> None:
        """End the daemons, then whatever they left: a task and its slurmstepd outlive their slurmd."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid, _ in self._processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Processes with this cluster's configuration in their environment, with that environment."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended, or is another user's
                continue
            variables = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if variables.get("SLURM_CONF") == str(self.configuration):
                yield int(path.parent.name), variables


def wait_until(is_true: Callable[[], bool], timeout_seconds: float, *, what: str) -> None:
    """Ask until the answer is yes; TimeoutError names what was waited for."""
    deadline = time.monotonic() + timeout_seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not in {timeout_seconds:.0f} s")
        time.sleep(0.2)
