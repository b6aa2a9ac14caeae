"""Nodes of a real Slurm that crash, lose their daemon, their memory, their files or the right time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from system.hosts import Host
from system.processes import wait_for_end, wait_until
from system.slurm_cluster import Cluster, needs_slurm
from system.slurm_runs import (
    finish,
    job_log,
    jobs,
    launch,
    launch_folder,
    new_run,
    processes_of,
    rank_process,
    wait_for_steps,
)
from tiny_run import losses

pytestmark = [pytest.mark.system, needs_slurm]

LONG = 100_000  # steps that no test waits for


@pytest.fixture
def nodes(slurm: Cluster) -> dict[str, Host]:
    if not slurm.hosts:
        pytest.skip("all nodes are this machine")
    wait_until(lambda: slurm.idle() == len(slurm.hosts), what="idle nodes", timeout_s=60)
    return slurm.hosts


def on(host: Host, *argv: str) -> None:
    subprocess.run((*host.prefix, *argv), check=True, capture_output=True, timeout=60)


def daemon_of(slurm: Cluster, name: str) -> int:
    """Process id of a node's slurmd."""
    wanted = f"slurmd\0-D\0-f\0{slurm.root}/slurm.conf\0-N\0{name}\0"
    found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.read_bytes().decode() == wanted]
    return int(found[0].parent.name)


@pytest.mark.slow
def test_a_lost_daemon_moves_the_job_to_other_nodes(slurm: Cluster, nodes: dict[str, Host], tmp_path: Path) -> None:
    """A node that Slurm hears nothing from, though its ranks still run: the job goes on elsewhere, alone."""
    run = new_run(tmp_path, {"max_steps": LONG}, save_interval_steps=50)
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=60)
    assert slurm.job(job)["NodeList"] == "node[1-2]"
    old = [rank_process(run, rank) for rank in range(2)]
    os.kill(daemon_of(slurm, "node2"), signal.SIGKILL)
    wait_until(lambda: slurm.restarts(job) == 1, what="the node to be given up", timeout_s=90)
    wait_for_end(old, timeout_s=60)
    before = run.newest_checkpoint()
    wait_for_steps(slurm, run, job, step=before + 20, sessions=1)
    assert slurm.job(job)["NodeList"] == "node[1,3]"
    assert run.newest_checkpoint() >= before >= 50
    slurm.run("scancel", job)
    slurm.begin_node("node2")


def test_a_run_is_not_trained_twice_by_two_jobs(slurm: Cluster, nodes: dict[str, Host], tmp_path: Path) -> None:
    """D1: on another node, the second is refused with host, process and job of the first."""
    run = new_run(tmp_path, {"max_steps": LONG}, num_nodes=1)
    first = launch(slurm, run)
    wait_for_steps(slurm, run, first, step=5)
    script = launch_folder(run) / "job.sh"
    said = slurm.run(
        "sbatch", "--parsable", f"--chdir={script.parent}", "--nodelist=node3", "--export=ALL", str(script)
    )
    facts = finish(slurm, run, said.strip(), state="FAILED")
    assert facts["ExitCode"] == "6:0"
    assert re.search(rf"is in use by process \d+ on node1 in Slurm job {first} since ", job_log(run)), job_log(run)
    assert slurm.state(first) == "RUNNING"
    slurm.run("scancel", first)


@pytest.mark.parametrize("exclude", [pytest.param(False, marks=pytest.mark.slow), True], ids=["named", "left out"])
def test_a_node_that_does_not_see_the_work_directory(
    exclude: bool, slurm: Cluster, nodes: dict[str, Host], tmp_path: Path
) -> None:
    """C8."""
    run = new_run(tmp_path, exclude_bad_nodes=exclude)
    run.work.root.mkdir()
    on(nodes["node2"], "mount", "-t", "tmpfs", "none", str(run.work.root))
    try:
        job = launch(slurm, run)
        facts = finish(slurm, run, job, state="FAILED")
        assert facts["ExitCode"] == "6:0"
        assert f"failed: node2: {launch_folder(run)} cannot be written there." in job_log(run)
        if exclude:
            facts = finish(slurm, run, jobs(run)[-1])
            assert facts["NodeList"] == "node[1,3]"
    finally:
        on(nodes["node2"], "umount", str(run.work.root))


def test_a_read_only_node_is_named(slurm: Cluster, nodes: dict[str, Host], tmp_path: Path) -> None:
    """C8."""
    run = new_run(tmp_path)
    run.work.root.mkdir()
    on(nodes["node2"], "mount", "--bind", "--options", "ro", str(run.work.root), str(run.work.root))
    try:
        facts = finish(slurm, run, launch(slurm, run), state="FAILED")
        assert facts["ExitCode"] == "6:0"
        assert f"failed: node2: {launch_folder(run)} cannot be written there." in job_log(run)
    finally:
        on(nodes["node2"], "umount", str(run.work.root))


@pytest.mark.slow
def test_clocks_five_minutes_apart(slurm: Cluster, nodes: dict[str, Host], tmp_path: Path) -> None:
    """A11: node2 lives in the future. The newest checkpoint is that of the highest step, and the curve is the same."""
    library = tmp_path / "wrong_clock.so"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True, timeout=60)
    clock = {"LD_PRELOAD": str(library), "WRONG_CLOCK": "/mnt/clock"}
    plain = new_run(tmp_path / "plain", {"max_steps": 40})
    finish(slurm, plain, launch(slurm, plain))
    run = new_run(tmp_path / "apart", {"max_steps": 40}, env=clock, save_interval_steps=10)
    on(nodes["node2"], "mount", "-t", "tmpfs", "none", "/mnt")
    on(nodes["node2"], "sh", "-c", "echo +300 > /mnt/clock")
    try:
        job = launch(slurm, run)
        wait_for_steps(slurm, run, job, step=25)
        slurm.run("scancel", "--signal=USR2", job)
        wait_until(lambda: slurm.restarts(job) == 1, what="the restart")
        slurm.run("scontrol", "update", f"JobId={job}", "ExcNodeList=node1")  # rank 0 in the future now
        facts = finish(slurm, run, job)
        assert facts["NodeList"] == "node[2-3]"
        begun = re.findall(r"^NEW RUN (\S+)$", (run.work.out / "train_log.txt").read_text(), re.MULTILINE)
        first, second = (datetime.strptime(text, "%Y-%m-%d-%H-%M-%S") for text in begun)
        assert (second - first).total_seconds() > 250  # the clock is wrong indeed
        assert run.result() == plain.result()
        assert losses(run.work.root) == losses(plain.work.root)
    finally:
        on(nodes["node2"], "umount", "/mnt")


def test_a_crashed_host(slurm: Cluster, nodes: dict[str, Host], tmp_path: Path) -> None:
    """Last, for it leaves two nodes."""
    run = new_run(tmp_path, {"max_steps": LONG}, save_interval_steps=50)
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=60)
    nodes["node2"].crash()
    wait_until(lambda: slurm.restarts(job) == 1, what="the node to be given up", timeout_s=90)
    before = run.newest_checkpoint()
    wait_for_steps(slurm, run, job, step=before + 20, sessions=1)
    assert slurm.job(job)["NodeList"] == "node[1,3]"
    slurm.run("scancel", job)
    wait_until(lambda: not processes_of(run), what="the end of every process", timeout_s=30)
