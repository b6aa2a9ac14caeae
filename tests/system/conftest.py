"""What system tests share: processes that end with their test, and a Slurm cluster that ends with the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from system.processes import Job, Watched
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
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Watched]:
    """`unbroken(make, ranks, **training)`: the run of `make(folder, **training)` that nothing interrupts.

    Each is made when it is first asked for, and is not to be changed.
    """
    complete: dict[tuple[object, ...], Watched] = {}

    def run_of(make: Callable[..., Watched], ranks: int | None = None, **training: object) -> Watched:
        key = (make.__module__, make.__name__, ranks, *sorted(training.items()))
        if key not in complete:
            run = make(tmp_path_factory.mktemp("unbroken"), **training)
            Job(run.folder, ranks=ranks).complete()
            complete[key] = run
        return complete[key]

    return run_of


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
