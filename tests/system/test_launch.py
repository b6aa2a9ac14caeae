"""`rwkv-cluster launch` and what follows it on real processes: two hosts, DeepSpeed's launcher, a cancelled job."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from system.hosts import hosts, reason_not_to
from system.processes import Job, Watched, alive, descendants, wait_for_end, wait_until
from tiny_run import losses, tiny_config, write_config

pytestmark = pytest.mark.system


def _new_run(folder: Path, training: dict[str, Any], **launch: Any) -> Watched:
    folder.mkdir(exist_ok=True)
    training = {"micro_bsz": 2, "global_batch_size": 4, "timeout_s": 60} | training
    config = tiny_config(folder, training=training, checkpoint={"save_interval_steps": 5000}, launch=launch)
    write_config(folder / "run.yaml", config)
    return Watched(folder)


@pytest.fixture
def one_process(tmp_path: Path) -> list[float]:
    run = _new_run(tmp_path / "one", {"max_steps": 10})
    Job(run.folder).complete()
    return losses(run.work.root)


def test_torchrun_on_two_hosts_with_their_own_addresses(
    one_process: list[float], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """The same command on each; nothing but launch.rdzv_endpoint tells them of each other."""
    if reason := reason_not_to():
        pytest.skip(reason)
    run = _new_run(
        tmp_path / "two", {"max_steps": 10}, target="torchrun", num_nodes=2, ranks_per_node=1, rdzv_endpoint="gpu01"
    )
    with hosts(["gpu01", "gpu02"]) as machines:
        prefixes = [(*machine.prefix, "env", f"--chdir={run.folder}") for machine in machines]
        launched = [start(run.folder, verb="launch", prefix=prefix) for prefix in prefixes]
        for job in launched:
            job.complete()
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)


def test_deepspeeds_own_launcher(one_process: list[float], tmp_path: Path) -> None:
    run = _new_run(tmp_path / "two", {"max_steps": 10, "zero_stage": 2}, target="deepspeed", ranks_per_node=2)
    Job(run.folder, verb="launch", environment={"DS_ACCELERATOR": "cpu"}).complete()
    assert losses(run.work.root) == pytest.approx(one_process, rel=1e-6)


@pytest.mark.parametrize("target", ["local", "torchrun"])
def test_a_running_job_is_cancelled_from_its_work_directory(
    target: str, tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, {"max_steps": 100_000}, target=target, ranks_per_node=1 if target == "local" else 2)
    job = start(run.folder, verb="launch")
    run.wait_for_steps(job, sessions=0, step=5)
    workers = descendants(job.process.pid)
    assert _say("status", run)["state"] == "running"
    assert "100,000 steps" in _say("logs", run)["text"]
    found = _say("cancel", run)
    assert (found["state"], found["detail"]) == ("ended", "exit code 75")
    assert job.wait(20) == 75
    assert run.newest_checkpoint() > 0
    wait_for_end(workers, timeout_s=15)


def test_a_cancelled_job_that_does_not_end_is_killed(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path, {"max_steps": 100_000}, target="torchrun", ranks_per_node=2)
    job = start(run.folder, verb="launch")
    run.wait_for_steps(job, sessions=0, step=5)
    workers = descendants(job.process.pid)
    assert _say("cancel", run, "--now")["state"] == "ended"
    wait_for_end(workers, timeout_s=15)
    wait_until(lambda: not alive(job.process.pid), what="the end of the launching process", timeout_s=15)


def _say(verb: str, run: Watched, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "rwkv_cluster", verb, str(run.work.root), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", ["two words", "it's", 'a "b"', "$HOME", "a;b", "ünï", "back\\slash"])
def test_any_directory_name_from_text_to_weights(name: str, tmp_path: Path) -> None:
    """H5: through bash, torchrun and the agent; a newline is refused (tests/launch/test_hostile.py)."""
    run = _new_run(tmp_path / name, {"max_steps": 2}, target="torchrun", ranks_per_node=2)
    Job(run.folder, verb="launch").complete()
    assert run.work.final_weights.exists()
