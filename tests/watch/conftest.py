"""Jobs of a test, ended with it."""

import pytest

from tests.watch.ranks import Job


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(world_size, body, **options):
        jobs.append(Job(tmp_path, world_size, body, **options))
        return jobs[-1]

    yield start
    for started in jobs:
        started.stop()
