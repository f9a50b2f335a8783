"""Debian's packages, unpacked into a cache folder; nothing is installed on the system."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SLURM = [
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libslurm38", "munge", "libmunge2"),
    *("libhwloc15", "liblua5.1-0", "libdbus-1-3", "libjson-c5", "libyaml-0-2", "libnuma1"),
]
SSH = ["openssh-server", "openssh-client", "libwrap0", "pdsh", "libgenders0"]


class UnavailableError(RuntimeError):
    """Packages cannot be had on this machine; the message says why."""


def unpacked(packages: Sequence[str], cache: Path) -> Path:
    """Return the folder with the unpacked packages, fetching them on first use.

    Raises UnavailableError without Debian's tools, without a network, or where Debian has other packages.
    """
    root = cache / "root"
    if root.is_dir():
        return root
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} not found: {packages[0]} comes from Debian's packages")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        aside = Path(folder)
        _download(packages, aside)
        for package in aside.glob("*.deb"):
            _require("dpkg", "-x", str(package), str(aside / "root"), cwd=aside)
        try:
            (aside / "root").rename(root)
        except OSError:
            if not root.is_dir():  # else another run of tests was first
                raise
    return root


def _download(packages: Sequence[str], folder: Path) -> None:
    network = ("-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1")
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        _require("apt-get", *network, "update", cwd=folder)
    _require("apt-get", *network, "download", *packages, cwd=folder)


def _require(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{' '.join(command[:2])}...: no answer in 300 s") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UnavailableError(f"{command[0]} cannot fetch or unpack packages: {reason[-1]}")
