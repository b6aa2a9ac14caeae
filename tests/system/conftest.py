"""Starts processes for the system tests, and ends those that a failed test has left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from system.processes import Job


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
