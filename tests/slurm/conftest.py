from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages import SLURM, UnavailableError, unpacked
from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running two-node Slurm; without its packages the test is skipped, or fails, and says why."""
    try:
        root = unpacked(SLURM, REPOSITORY / ".cache" / "slurm")
    except UnavailableError as reason:
        if request.config.getoption("--require-slurm"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))
    with Cluster(root) as running:
        yield running
