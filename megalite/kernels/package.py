"""Packages of others that kernels come from: what is not here of them, and how to get it."""

from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Protocol

import torch


class Source(Protocol):
    """Where a kernel of others comes from."""

    def refusal(self, setting: str, value: str, device: torch.device) -> str | None:
        """The line that refuses a value of a setting on a device; None where it computes there."""


@dataclass(frozen=True)
class Package:
    """What a kernel of others runs on.

    Attributes:
        name: as it is told to people.
        module: as it is imported.
        part: a module right within it, which other projects of the same name lack.
        extension: what computes on a GPU, and is there only where it was built or installed along.
        on_cpu: whether it computes on a CPU as well.
        remedy: how to get it.
    """

    name: str
    module: str
    part: str
    extension: str
    on_cpu: bool
    remedy: str

    def refusal(self, setting: str, value: str, device: torch.device) -> str | None:
        """The line that refuses a value of a setting on a device; None where the package computes there."""
        if device.type != "cuda" and not (self.on_cpu and device.type == "cpu"):
            return f"{setting} {value} needs a GPU and this run is on {device.type}: set {setting}=auto"
        lack = self._lack(device)
        return None if lack is None else f"{setting} {value} {lack}: {self.remedy}, or set {setting}=auto"

    def _lack(self, device: torch.device) -> str | None:
        """Nothing of it is imported: a project that only has its name could do anything then."""
        found = find_spec(self.module)
        if found is None:
            return f"needs {self.name}, which is not installed"
        if PathFinder.find_spec(f"{self.module}.{self.part}", found.submodule_search_locations) is None:
            return (
                f"needs {self.name}, and the package {self.module} that is installed is another project, "
                f"without {self.module}.{self.part} (pip uninstall {self.module} removes it)"
            )
        if device.type == "cuda" and find_spec(self.extension) is None:
            return f"computes by {self.extension}, and {self.name} is installed without it"
        return None


def apex(part: str, extension: str, *, on_cpu: bool) -> Package:
    """NVIDIA's, which no package index has: PyPI's apex is another project."""
    remedy = "build it from the sources of github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
    return Package("NVIDIA's apex", "apex", part, extension, on_cpu, remedy)


def liger() -> Package:
    """Liger Kernel (Hsu 2024, arXiv 2410.10989): programs of Triton."""
    return Package("Liger Kernel", "liger_kernel", "ops", "triton", False, "pip install liger-kernel triton")
