"""What a node runs: code, versions and configuration, to be the same on all."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import megalite
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.exit_status import MISTAKE
from megalite.preflight.fault import Fault
from megalite.training.versions import versions

HASH_DIGITS = 12
Inventory = dict[str, str]  # what -> which


def take_inventory(run: RunConfig, deepspeed: DeepSpeedConfig) -> Inventory:
    """This process's code, versions and resolved configuration."""
    configuration = dump_run(run) + json.dumps(deepspeed.raw, sort_keys=True)
    return {
        "code": hash_of_code(Path(megalite.__file__).parent),
        "configuration": hashlib.sha256(configuration.encode()).hexdigest()[:HASH_DIGITS],
        "python": platform.python_version(),
        **versions(),
    }


def hash_of_code(folder: Path) -> str:
    """A hash over the names and contents of every .py file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:HASH_DIGITS]


def differences(inventories: Mapping[int, Inventory], nodes: Mapping[int, str]) -> list[Fault]:
    """A fault for each thing that is not the same on all ranks: which nodes have what."""
    faults = []
    for what in next(iter(inventories.values())):
        where: dict[str, set[str]] = {}
        for rank, inventory in inventories.items():
            where.setdefault(inventory[what], set()).add(nodes[rank])
        if len(where) > 1:
            told = "; ".join(f"{which} on {', '.join(sorted(there))}" for which, there in where.items())
            faults.append(Fault(MISTAKE, f"{what} differs: {told}: every node must have the same"))
    return faults
