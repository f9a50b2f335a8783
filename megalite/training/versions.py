"""The versions of what computes, kept in checkpoints and compared when a run goes on."""

import importlib.metadata
from collections.abc import Mapping

PACKAGES = ("megalite", "torch", "deepspeed", "numpy")
UNKNOWN = "unknown"  # of a checkout that is not installed


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def versions() -> dict[str, str]:
    """Those of this process."""
    return {name: version_of(name) for name in PACKAGES}


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Each package whose version is another one, with both, in words; None where all are the same.

    What one side does not name, or does not know, is not compared.
    """
    known = [name for name in now if UNKNOWN not in (before.get(name, UNKNOWN), now[name])]
    changed = [f"{name} {before[name]} -> {now[name]}" for name in known if before[name] != now[name]]
    return ", ".join(changed) or None
