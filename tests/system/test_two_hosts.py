"""C5: a run on two hosts, also when the network between them is slow, loses packets, or is gone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from system.cable import Cable, Host, reason_not_to, two_hosts
from system.processes import Job, Watched, descendants, new_run, wait_for_end

REASON = None if os.environ.get("CI") else reason_not_to()
pytestmark = [pytest.mark.system, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

TIMEOUT_S = 10.0
PORT = 29400


@pytest.fixture
def network() -> Iterator[tuple[list[Host], Cable]]:
    with two_hosts() as made:
        yield made


def _new_run(folder: Path, **training: Any) -> Watched:
    training = {"max_steps": 5, "micro_bsz": 2, "timeout_s": 60} | training
    return new_run(folder, training=training, checkpoint={"save_interval_steps": 5000})


def _begin(run: Watched, hosts: list[Host], rendezvous: str, start: Callable[..., Job]) -> list[Job]:
    """A torchrun on each host, one rank each, which meet at the first host's address."""
    first = hosts[0].address
    common = ["--nnodes", "2", "--nproc-per-node", "1"]
    ways = {
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"{first}:{PORT}", "--local-addr"],
        "static": ["--master-addr", first, "--master-port", str(PORT), "--node-rank"],
    }
    jobs = []
    for number, host in enumerate(hosts):
        # is_host: torchrun would look the name of this machine up, which is not that of a namespace
        own = [host.address, "--rdzv-conf", f"is_host={int(number == 0)}"] if rendezvous == "c10d" else [str(number)]
        jobs.append(
            start(
                run.folder,
                launcher=[*common, *ways[rendezvous], *own],
                prefix=["ip", "netns", "exec", host.namespace],
                environment={"GLOO_SOCKET_IFNAME": host.interface},
            )
        )
    return jobs


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = _new_run(tmp_path_factory.mktemp("one"))
    Job(run.folder, ranks=2).complete()
    return run.result()


@pytest.mark.parametrize(
    ("delay_s", "loss"),
    [pytest.param(0.0, 0.0, marks=pytest.mark.slow), pytest.param(0.2, 0.0, marks=pytest.mark.slow), (0.0, 0.2)],
    ids=["good", "slow", "lossy"],
)
def test_two_hosts_equal_one(
    delay_s: float,
    loss: float,
    network: tuple[list[Host], Cable],
    one_host: dict[str, object],
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    hosts, cable = network
    cable.delay_s, cable.loss = delay_s, loss
    run = _new_run(tmp_path)
    for job in _begin(run, hosts, "c10d", start):
        job.complete()
    assert run.result() == one_host


@pytest.mark.slow
def test_half_of_all_frames_lost_for_a_while(
    network: tuple[list[Host], Cable], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """While training, because TCP gives up making a connection long before it gives up one that is made.

    It waits twice as long after each loss: a training whose network stays like this makes a step in minutes.
    """
    hosts, cable = network
    alone, run = (_new_run(tmp_path / name, max_steps=50) for name in ("alone", "two"))
    Job(alone.folder, ranks=2).complete()
    jobs = _begin(run, hosts, "c10d", start)
    run.wait_for_steps(jobs[0], sessions=0, step=10)
    cable.loss = 0.5
    time.sleep(15)
    lost, cable.loss = cable.lost, 0.0
    for job in jobs:
        job.complete()
    assert lost > 20
    assert run.result() == alone.result()


def test_a_cut_network_ends_both_hosts(
    network: tuple[list[Host], Cable], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """No packet arrives any more, and no connection is reset.

    With torchrun's c10d rendezvous the ranks end as soon, but the torchrun of the second host waits on for a store
    that it cannot reach.
    """
    hosts, cable = network
    run = _new_run(tmp_path, max_steps=100_000, timeout_s=TIMEOUT_S)
    jobs = _begin(run, hosts, "static", start)
    run.wait_for_steps(jobs[0], sessions=0, step=20)
    time.sleep(2)  # records are renewed once a second
    workers = [pid for job in jobs for pid in descendants(job.process.pid)]
    cable.loss = 1.0
    deadline = time.monotonic() + TIMEOUT_S + 15
    for rank, job in enumerate(jobs):
        assert job.wait(deadline - time.monotonic()) != 0
        named = rf"rank {rank}: error: (rank [01]: )?rank [01] on \S+, process \d+, last finished step \d+, cannot be"
        assert re.search(named, job.text), job.text
    wait_for_end(workers, timeout_s=1)
