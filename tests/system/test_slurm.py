"""Runs on a real Slurm: one curve on two nodes, preemptions without a trace, failures with a name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system.processes import Job, Watched, wait_until
from system.slurm_cluster import Cluster, cluster, reason_not_to
from tiny_run import losses, tiny_config, write_config

REASON = None if os.environ.get("CI") else reason_not_to()
pytestmark = [pytest.mark.system, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def new_run(folder: Path, training: dict[str, Any] | None = None, **launch: Any) -> Watched:
    folder.mkdir(exist_ok=True)
    launch = {"target": "sbatch", "num_nodes": 2, "ranks_per_node": 1, "env": {"GLOO_SOCKET_IFNAME": "lo"}} | launch
    training = {"max_steps": 30, "micro_bsz": 2, "timeout_s": 60} | (training or {})
    config = tiny_config(folder, training=training, checkpoint={"save_interval_steps": 100_000}, launch=launch)
    write_config(folder / "run.yaml", config)
    return Watched(folder)


def launch(slurm: Cluster, run: Watched, *arguments: str, fault: str | None = None) -> str:
    """Launch a run; the number of its training job."""
    environment = {**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1"}
    environment |= {"RWKV_CLUSTER_FAULT": fault} if fault else {}
    command = [sys.executable, "-m", "rwkv_cluster", "launch", "run.yaml", *arguments]
    done = subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (folder,) = (run.work.root / "launch").iterdir()
    return (folder / "jobs").read_text().split()[-1]


def logs(run: Watched) -> str:
    files = sorted((run.work.root / "launch").glob("*/*.log"))
    return "".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)


def finish(slurm: Cluster, run: Watched, job: str, *, state: str = "COMPLETED") -> dict[str, str]:
    facts = slurm.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    assert facts["JobState"] == state, logs(run)
    return facts


def wait_for_steps(slurm: Cluster, run: Watched, job: str, step: int, sessions: int = 0) -> None:
    def reached() -> bool:
        return run.sessions() > sessions and run.steps_logged() >= step

    try:
        wait_until(reached, what=f"step {step}", timeout_s=90)
    except AssertionError as error:
        raise AssertionError(f"{error}, job {slurm.state(job)}\n{logs(run)}") from None


def test_two_nodes_with_two_ranks_follow_one_process(slurm: Cluster, tmp_path: Path) -> None:
    """H3: ranks 0 to 3 are seen once each; the curve is that of one process."""
    one = new_run(tmp_path / "one", {"global_batch_size": 8, "max_steps": 10})
    Job(one.folder).complete()
    run = new_run(tmp_path / "four", {"global_batch_size": 8, "max_steps": 10}, ranks_per_node=2, gpus_per_node=2)
    job = launch(slurm, run)
    finish(slurm, run, job)
    assert losses(run.work.root) == pytest.approx(losses(one.work.root), rel=1e-6)
    (folder,) = (run.work.root / "launch").iterdir()
    assert sorted(path.name for path in folder.glob("rank-*.log")) == [f"rank-{rank}.log" for rank in range(4)]
    facts = slurm.job(job)
    assert (facts["Requeue"], facts["NumNodes"]) == ("1", "2")


def test_five_preemptions_leave_no_trace(slurm: Cluster, tmp_path: Path) -> None:
    """A5: Slurm's signal five times in one run; the same job goes on, and the weights are those of the unbroken run."""
    whole = new_run(tmp_path / "whole", {"max_steps": 300})
    finish(slurm, whole, launch(slurm, whole))
    run = new_run(tmp_path / "broken", {"max_steps": 300})
    job = launch(slurm, run)
    for round_ in range(5):
        wait_for_steps(slurm, run, job, step=run.newest_checkpoint() + 5, sessions=round_)
        slurm.run("scancel", "--signal=USR2", job)
        wait_until(lambda done=round_ + 1: int(slurm.job(job)["Restarts"]) == done, what=f"restart {round_ + 1}")  # type: ignore[misc]
    finish(slurm, run, job)
    assert run.sessions() == 6
    assert run.result() == whole.result()


def test_scancel_leaves_no_process_and_queues_nothing_again(slurm: Cluster, tmp_path: Path) -> None:
    """C6."""
    run = new_run(tmp_path / "run", {"max_steps": 100_000})
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED", timeout_s=30)
    wait_until(lambda: not processes_of(run), what="the end of every process", timeout_s=30)
    assert slurm.job(job)["Restarts"] == "0"


def processes_of(run: Watched) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [text for text in found if str(run.work.root) in text]


def test_a_failing_rank_is_named_with_its_node_and_code(slurm: Cluster, tmp_path: Path) -> None:
    """C2, C10: bad data on rank 0 ends the job with code 3."""
    run = new_run(tmp_path / "run")
    with open(run.folder / "text.jsonl", "a") as handle:
        handle.write('{"text": 5}\n')
    job = launch(slurm, run)
    facts = finish(slurm, run, job, state="FAILED")
    assert facts["ExitCode"] == "3:0"
    (folder,) = (run.work.root / "launch").iterdir()
    assert "failed: rank 0 on node1 failed (data): " in (folder / "job.log").read_text()


def test_a_stop_file_ends_with_75_and_is_not_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", {"max_steps": 100_000})
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    (run.work.root / "STOP").touch()
    facts = finish(slurm, run, job, state="FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0")
    assert run.newest_checkpoint() > 0


def test_training_waits_for_the_prepare_job(slurm: Cluster, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", {"max_steps": 5}, prepare={"own_job": True, "cpus": 1})
    finish(slurm, run, launch(slurm, run))
    assert "tokens in " in (next((run.work.root / "launch").iterdir()) / "rank-0.log").read_text()
