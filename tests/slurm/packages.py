"""Slurm from Debian's packages, unpacked into a cache folder; nothing is installed on the system."""

import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGES = [
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libslurm38", "munge", "libmunge2"),
    *("libhwloc15", "liblua5.1-0", "libdbus-1-3", "libjson-c5", "libyaml-0-2", "libnuma1"),
]


class SlurmUnavailableError(RuntimeError):
    """Slurm's packages cannot be had on this machine; the message says why."""


def install_slurm(cache: Path) -> Path:
    """Return the folder with Slurm's unpacked packages, fetching them on first use.

    Raises SlurmUnavailableError without Debian's tools, without a network, or where Debian has another Slurm.
    """
    root = cache / "root"
    if root.is_dir():
        return root
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise SlurmUnavailableError(f"{tool} not found: Slurm's test cluster comes from Debian packages")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        aside = Path(folder)
        _download(aside)
        for package in aside.glob("*.deb"):
            _require("dpkg", "-x", str(package), str(aside / "root"), cwd=aside)
        (aside / "root").rename(root)
    return root


def _download(folder: Path) -> None:
    network = ("-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1")
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        _require("apt-get", *network, "update", cwd=folder)
    _require("apt-get", *network, "download", *PACKAGES, cwd=folder)


def _require(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(f"{' '.join(command[:2])}...: no answer in 300 s") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SlurmUnavailableError(f"{command[0]} cannot fetch or unpack Slurm: {reason[-1]}")
