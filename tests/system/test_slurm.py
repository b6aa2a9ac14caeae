"""Runs on a real Slurm: one curve on two nodes, preemptions without a trace, failures with a name."""

from __future__ import annotations

import functools
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from system.processes import Job, wait_until
from system.slurm_cluster import Cluster, needs_slurm
from system.slurm_runs import (
    finish,
    job_log,
    jobs,
    launch,
    launch_folder,
    logs,
    new_run,
    processes_of,
    rank_process,
    rwkv_cluster,
    wait_for_steps,
)
from tiny_run import fingerprint, losses

from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE

STEPS = 200
LOOK_S = 30  # between two looks of Slurm's at the time limits
pytestmark = [pytest.mark.system, needs_slurm]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of ten steps of one process."""
    run = new_run(tmp_path_factory.mktemp("one"), {"global_batch_size": 8, "max_steps": 10})
    Job(run.folder).complete()
    return losses(run.work.root)


def test_two_nodes_with_two_ranks_follow_one_process(slurm: Cluster, one_process: list[float], tmp_path: Path) -> None:
    """H3: ranks 0 to 3 are seen once each; the curve is that of one process."""
    run = new_run(
        tmp_path,
        {"global_batch_size": 8, "max_steps": 10, "accelerator": "cpu"},
        ranks_per_node=2,
        gpus_per_node=2,
    )
    job = launch(slurm, run)
    finish(slurm, run, job)
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)
    folder = launch_folder(run)
    assert sorted(path.name for path in folder.glob("rank-*.log")) == [f"rank-{rank}.log" for rank in range(4)]
    facts = slurm.job(job)
    assert (facts["Requeue"], facts["NumNodes"]) == ("1", "2")


@pytest.fixture(scope="module")
def unbroken_result(
    running_slurm: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, object]]:
    """`unbroken_result(steps)`: result of a run of so many steps that nothing interrupts."""

    @functools.cache
    def result_of(steps: int) -> dict[str, object]:
        run = new_run(tmp_path_factory.mktemp("unbroken"), {"max_steps": steps})
        finish(running_slurm, run, launch(running_slurm, run))
        return run.result()

    return result_of


def wait_for_restarts(slurm: Cluster, job: str, number: int) -> None:
    wait_until(lambda: slurm.restarts(job) == number, what=f"restart {number} of job {job}")


def preempt(slurm: Cluster, job: str) -> None:
    """A job of a partition with precedence wants all nodes."""
    slurm.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")


def requeue(slurm: Cluster, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


def reach_time_limit(slurm: Cluster, job: str) -> None:
    """The limit comes to the job: launch.signal_s before it the signal is sent, at the next look of Slurm's."""
    restarts = slurm.restarts(job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait_until(lambda: slurm.restarts(job) > restarts, what="the time limit")
    wait_until(lambda: slurm.accepts("scontrol", "update", f"JobId={job}", "TimeLimit=10"), what="the old limit")


def send_signal(slurm: Cluster, job: str) -> None:
    slurm.run("scancel", "--signal=USR2", job)


@pytest.mark.slow
@pytest.mark.parametrize(
    "interruptions",
    [
        (reach_time_limit, preempt),
        (reach_time_limit, preempt, requeue, send_signal, send_signal),
    ],
    ids=["two", "five"],
)
def test_interruptions_leave_no_trace(
    interruptions: tuple[Callable[[Cluster, str], None], ...],
    slurm: Cluster,
    unbroken_result: Callable[[int], dict[str, object]],
    tmp_path: Path,
) -> None:
    """A4, A5: the time limit, a partition with precedence, an operator and the signal alone, in one run and one job."""
    last = STEPS - 50  # until there a step is so slow that Slurm looks before it
    slow = f"data.batch@1-{last}:sleep={1.5 * LOOK_S / last}"
    run = new_run(tmp_path, {"max_steps": STEPS}, setup=[f"export {FAULT_VARIABLE}={slow}"])
    job = launch(slurm, run)
    for number, interrupt in enumerate(interruptions, 1):
        wait_for_steps(slurm, run, job, step=run.newest_checkpoint() + 5, sessions=number - 1)
        interrupt(slurm, job)
        wait_for_restarts(slurm, job, number)
    finish(slurm, run, job)
    assert run.sessions() == len(interruptions) + 1
    assert run.result() == unbroken_result(STEPS)


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_submitit_is_preempted(
    times: int, slurm: Cluster, unbroken_result: Callable[[int], dict[str, object]], tmp_path: Path
) -> None:
    """A5: jobs of less than ten minutes are no timeouts, and no task that goes on leaves a result."""
    steps = 40 * (times + 1)
    slow = f"data.batch@1-{steps - 20}:sleep=0.05"  # so that each signal comes before the end
    run = new_run(tmp_path, {"max_steps": steps}, target="slurm", setup=[f"export {FAULT_VARIABLE}={slow}"])
    job = launch(slurm, run)
    for number in range(1, times + 1):
        wait_for_steps(slurm, run, job, step=run.newest_checkpoint() + 5, sessions=number - 1)
        send_signal(slurm, job)
        wait_for_restarts(slurm, job, number)
        assert not list(launch_folder(run).glob("*_result.pkl"))
    finish(slurm, run, job)
    assert run.sessions() == times + 1
    assert run.result() == unbroken_result(steps)
    for task in range(2):
        with open(launch_folder(run) / f"{job}_{task}_result.pkl", "rb") as handle:
            assert pickle.load(handle) == ("success", None)


def test_submitit_says_which_rank_died(slurm: Cluster, tmp_path: Path) -> None:
    """C1: not rank 0, whose task Slurm ends; its exit code is the job's."""
    run = new_run(tmp_path, {"max_steps": 100_000}, target="slurm")
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    facts = finish(slurm, run, job, state="FAILED")
    assert facts["ExitCode"] == "1:0"
    assert re.search(r"failed: rank 1 on node2 .*\(rank 1 .*signal 9, SIGKILL\)", job_log(run))


@pytest.mark.parametrize("target", ["sbatch", pytest.param("slurm", marks=pytest.mark.slow)])
def test_a_site_that_queues_nothing_again(target: str, slurm: Cluster, tmp_path: Path) -> None:
    """A job that follows goes on, for both ways to Slurm."""
    run = new_run(tmp_path, {"max_steps": 60}, target=target, num_nodes=1)
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    slurm.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    send_signal(slurm, job)
    facts = finish(slurm, run, job, state="FAILED")
    assert facts["ExitCode"] == "75:0"
    first, second = jobs(run)
    finish(slurm, run, second)
    assert first == job
    assert run.newest_checkpoint() == 60


@pytest.mark.parametrize("target", [pytest.param("sbatch", marks=pytest.mark.slow), "slurm"])
def test_queued_again_as_often_as_allowed(target: str, slurm: Cluster, tmp_path: Path) -> None:
    run = new_run(tmp_path, {"max_steps": 100_000}, target=target, max_requeues=1, num_nodes=1)
    job = launch(slurm, run)
    for session in range(2):
        wait_for_steps(slurm, run, job, step=run.newest_checkpoint() + 5, sessions=session)
        send_signal(slurm, job)
        wait_for_restarts(slurm, job, 1)
    facts = finish(slurm, run, job, state="FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "1")
    assert "queued again 1 times, launch.max_requeues" in job_log(run)


def test_a_task_for_each_rank(slurm: Cluster, one_process: list[float], tmp_path: Path) -> None:
    run = new_run(tmp_path, {"global_batch_size": 8, "max_steps": 10}, ranks_per_node=2, task_per="rank")
    finish(slurm, run, launch(slurm, run))
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)


def test_a_sweep_is_one_job_array(slurm: Cluster, tmp_path: Path) -> None:
    sweep = [{"training.random_seed": seed} for seed in (1, 2)]
    prepare = {"own_job": True, "cpus": 1}
    run = new_run(
        tmp_path, {"max_steps": 5}, target="slurm", num_nodes=1, sweep=sweep, sweep_at_once=1, prepare=prepare
    )
    job = launch(slurm, run)
    wait_until(lambda: "launch      COMPLETED" in rwkv_cluster(slurm, "status", run), what="the whole sweep")
    members = sorted((run.work.root / "sweep").iterdir())
    assert [member.name for member in members] == ["0", "1"]
    assert len({str(fingerprint(member)) for member in members}) == 2
    said = rwkv_cluster(slurm, "status", run)
    assert f"job {job}, run 0 COMPLETED, run 1 COMPLETED" in said


def test_memory_that_was_not_asked_for(slurm: Cluster, tmp_path: Path) -> None:
    """C8: the job's log says that Slurm ended it for its memory."""
    run = new_run(tmp_path, mem="300M", num_nodes=1)
    finish(slurm, run, launch(slurm, run), state="FAILED")
    assert "memory" in logs(run)


def test_status_logs_and_cancel_from_the_work_directory(slurm: Cluster, tmp_path: Path) -> None:
    """Also where what the user wrote of the job reads like Slurm's own answer."""
    words = "try lr=1 JobState=COMPLETED"
    run = new_run(tmp_path / words, {"max_steps": 100_000}, comment=words, num_nodes=1)
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    said = rwkv_cluster(slurm, "status", run)
    assert said.startswith("running  ")
    assert f"launch      RUNNING  sbatch, job {job}" in said
    assert f"in Slurm job {job} since " in said
    assert "100,000 steps" in rwkv_cluster(slurm, "logs", run, "--rank", "0")
    said = rwkv_cluster(slurm, "cancel", run)
    assert said.startswith("FAILED")  # with 75: it has saved
    assert slurm.job(job)["ExitCode"] == "75:0"
    assert run.newest_checkpoint() > 0


def test_scancel_leaves_no_process_and_queues_nothing_again(slurm: Cluster, tmp_path: Path) -> None:
    """C6."""
    run = new_run(tmp_path / "run", {"max_steps": 100_000})
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED", timeout_s=30)
    wait_until(lambda: not processes_of(run), what="the end of every process", timeout_s=30)
    assert slurm.job(job)["Restarts"] == "0"


def test_a_failing_rank_is_named_with_its_node_and_code(slurm: Cluster, tmp_path: Path) -> None:
    """C2, C10: bad data on rank 0 ends the job with code 3."""
    run = new_run(tmp_path / "run")
    with open(run.folder / "text.jsonl", "a") as handle:
        handle.write('{"text": 5}\n')
    job = launch(slurm, run)
    facts = finish(slurm, run, job, state="FAILED")
    assert facts["ExitCode"] == "3:0"
    assert "failed: rank 0 on node1 failed (data): " in job_log(run)


def test_a_stop_file_ends_with_75_and_is_not_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", {"max_steps": 100_000}, num_nodes=1)
    job = launch(slurm, run)
    wait_for_steps(slurm, run, job, step=5)
    (run.work.root / "STOP").touch()
    facts = finish(slurm, run, job, state="FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0")
    assert run.newest_checkpoint() > 0


@pytest.mark.slow  # the sweep has one too
def test_training_waits_for_the_prepare_job(slurm: Cluster, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", {"max_steps": 5}, prepare={"own_job": True, "cpus": 1})
    finish(slurm, run, launch(slurm, run))
    assert "tokens in " in (launch_folder(run) / "rank-0.log").read_text()
