"""What system tests share: processes that end with their test, and a Slurm cluster that ends with the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from system.processes import Job
from system.slurm_cluster import Cluster, cluster


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """`Job(...)`, ended with the test."""
    jobs: list[Job] = []

    def begin(*args: object, **kwargs: object) -> Job:
        jobs.append(Job(*args, **kwargs))  # type: ignore[arg-type]
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


@pytest.fixture(scope="session")
def running_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes."""
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def slurm(running_slurm: Cluster) -> Iterator[Cluster]:
    """The same, without a job before the test and after it."""
    yield running_slurm
    running_slurm.cancel_all()
