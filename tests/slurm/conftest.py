from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.packages import SlurmUnavailableError, install_slurm

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running two-node Slurm; without its packages the test is skipped, and says why."""
    try:
        root = install_slurm(REPOSITORY / ".cache" / "slurm")
    except SlurmUnavailableError as reason:
        pytest.skip(str(reason))
    with Cluster(root) as running:
        yield running
