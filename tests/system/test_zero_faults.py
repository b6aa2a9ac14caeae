"""ZeRO's ranks are killed, cannot write, or compute a NaN: all end, and go on from a whole checkpoint."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from system.processes import Job, Watched, new_run, wait_for_end, wait_until
from tiny_run import losses

from rwkv_cluster.report.run_files import events as read_events
from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, list_steps, newest_verified
from rwkv_cluster.workdir import sha256_file

pytestmark = pytest.mark.system

SAVE_INTERVAL = 10
END_S = 10.0


def _new_run(folder: Path, max_steps: int, *, background: bool = False, **training: object) -> Watched:
    return new_run(
        folder,
        training={"max_steps": max_steps, "micro_bsz": 2, "zero_stage": 2, **training},
        checkpoint={"save_interval_steps": SAVE_INTERVAL, "background": background},
    )


def _result(run: Watched) -> dict[str, object]:
    """What equal runs have in common: every rank's files of the last checkpoint, the final weights, every loss."""
    newest = checkpoint_path(run.work.checkpoints, max(list_steps(run.work.checkpoints)))
    hashes = {path.name: sha256_file(path) for path in (*newest.glob("*.pth"), run.work.final_weights)}
    assert len(hashes) == 5  # weights and moments of two ranks, and the final weights
    return {**hashes, "step": newest.name, "losses": [value.hex() for value in losses(run.work.root)]}


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rank_that_cannot_write_ends_both_without_a_commit(
    background: bool, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Row B7."""
    run = _new_run(tmp_path, 3000, background=background)
    job = start(run.folder, ranks=2, fault="checkpoint.after_weights@20#1:error=ENOSPC")
    run.wait_for_steps(job, sessions=0, step=20)
    assert job.wait(END_S) != 0
    sentence = next(line for line in job.text.splitlines() if "error: checkpoint" in line)
    assert "step-00000020 cannot be written: rank 1: No space left on device. It needs about" in sentence
    assert "exitcode  : 4" in job.text
    assert list_steps(run.work.checkpoints) == [run.newest_checkpoint()] == [10]
    assert not list(run.work.checkpoints.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("stage", "what", "precision"),
    [
        pytest.param(0, "gradient", "fp32", marks=pytest.mark.slow),
        pytest.param(1, "loss", "bf16", marks=pytest.mark.slow),
        (2, "gradient", "bf16"),
        pytest.param(3, "loss", "fp32", marks=pytest.mark.slow),
    ],
)
def test_nan_on_one_rank_stops_all_before_the_update(
    stage: int, what: str, precision: str, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Row G1."""
    run = _new_run(tmp_path, 3000, zero_stage=stage, precision=precision)
    job = start(run.folder, ranks=2, fault=f"train.{what}@13#1:hit")
    assert job.wait() == 1
    assert f"error: step 13: the {what} is not finite on rank 1 (" in job.text
    assert "exitcode  : 1 " in job.text
    assert "Samples 53 to 56" in job.text
    (event,) = (event for event in read_events(run.work.events) if event["kind"] == "nonfinite")
    assert (event["step"], event["what"], event["ranks"], event["samples"]) == (13, what, [1], [54, 56])
    assert f"those on rank 1 begin at token {', '.join(map(str, event['positions']))}. " in job.text
    assert run.steps_logged() == 13
    assert run.newest_checkpoint() == 10
    newest = newest_verified(run.work.checkpoints)
    for tensors in (newest.weights(), newest.optimizer()):
        assert all(tensors[name].isfinite().all() for name in tensors.keys())  # noqa: SIM118 -- ShardedTensors have keys only


@pytest.mark.parametrize(
    ("points", "kills"),
    [
        (("after_weights", "before_commit"), 1),
        pytest.param(
            ("after_weights", "after_optimizer", "before_manifest", "before_commit", "after_commit"),
            4,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["three times", "nine times"],
)
def test_killed_again_and_again(points: tuple[str, ...], kills: int, tmp_path: Path, start: Callable[..., Job]) -> None:
    """Row A3: a rank or the whole job, at random steps and inside the save; each time the same command again."""
    draw = random.Random(30)
    run, unbroken = (_new_run(tmp_path / name, 120) for name in ("killed", "unbroken"))
    for point in points:
        saved, rank = run.newest_checkpoint(), 1 if point.startswith("after_w") else 0
        fault = f"checkpoint.{point}@{saved + SAVE_INTERVAL}#{rank}:signal=SIGKILL"
        assert start(run.folder, ranks=2, fault=fault).wait() != 0
        assert run.newest_checkpoint() == saved + (SAVE_INTERVAL if point == "after_commit" else 0)
    for kill in range(kills):
        sessions, saved = run.sessions(), run.newest_checkpoint()
        # the step lasts, so that the signal does not come after the end; the kill is anywhere in it
        job = start(run.folder, ranks=2, fault=f"train.step@{saved + draw.randint(1, 15)}:sleep=2")
        workers = [job.worker(rank) for rank in (0, 1)]
        victim = [*workers, job.process.pid][kill % 3]
        if kill < 2:
            time.sleep(draw.uniform(0, 3))
        else:
            wait_until(lambda before=sessions: run.sessions() > before, what="the start of training")
            time.sleep(draw.uniform(0, 1.5))
        assert job.running(), job.text
        os.kill(victim, signal.SIGKILL)
        assert job.wait(END_S) != 0
        wait_for_end(workers, timeout_s=END_S)
        assert run.newest_checkpoint() >= saved
        assert run.steps_logged() - run.newest_checkpoint() <= SAVE_INTERVAL
    for each in (run, unbroken):
        start(each.folder, ranks=2).complete()
    assert not list(run.work.checkpoints.glob(".tmp-*"))
    assert _result(run) == _result(unbroken)
