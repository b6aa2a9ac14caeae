"""kill -9 at any time: the same command again ends where an unbroken run ends, repeating one save interval at most."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from system.processes import Job, Watched, descendants, new_run, wait_for_end, wait_until
from tiny_run import write_text

pytestmark = pytest.mark.system

SAVE_INTERVAL = 10
START_S = 3.0  # a process imports, checks and prepares for about this long before its first step
SAVE_POINTS = ("after_weights", "after_optimizer", "before_manifest", "before_commit", "after_commit")


def _new_run(folder: Path, max_steps: int) -> Watched:
    return new_run(
        folder,
        training={"max_steps": max_steps, "val_interval_steps": 50},
        checkpoint={"save_interval_steps": SAVE_INTERVAL},
    )


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_times(
    kills: int, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    draw = random.Random(20)
    run = _new_run(tmp_path, 300)
    for kill in range(kills):
        sessions, saved = run.sessions(), run.newest_checkpoint()
        job = start(run.folder)
        if kill % 3 == 0:
            time.sleep(draw.uniform(0.1, START_S))
        else:
            run.wait_for_steps(job, sessions=sessions, step=saved + draw.randint(1, 25))
            time.sleep(draw.uniform(0, 0.02))
        assert job.running(), job.text
        job.kill()
        assert run.newest_checkpoint() >= saved
        assert run.steps_logged() - run.newest_checkpoint() <= SAVE_INTERVAL
    start(run.folder).complete()
    assert run.result() == unbroken(_new_run, max_steps=300).result()


@pytest.mark.parametrize(
    ("by_itself", "from_outside"),
    [
        (("after_weights", "before_commit", "after_commit"), ("after_optimizer",)),
        pytest.param(SAVE_POINTS, SAVE_POINTS, marks=pytest.mark.slow),
    ],
    ids=["at some points", "at every point"],
)
def test_killed_inside_the_save(
    by_itself: tuple[str, ...],
    from_outside: tuple[str, ...],
    unbroken: Callable[..., Watched],
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    draw = random.Random(10)
    run = _new_run(tmp_path, 60)
    for point in by_itself:
        saved = run.newest_checkpoint()
        job = start(run.folder, fault=f"checkpoint.{point}@{saved + SAVE_INTERVAL}:signal=SIGKILL")
        assert job.wait() == -9, job.text
        assert run.newest_checkpoint() == saved + (SAVE_INTERVAL if point == "after_commit" else 0)
    for point in from_outside:
        saved = run.newest_checkpoint()
        name = "weights.pth" if point == "after_weights" else "optimizer.pth"
        job = start(run.folder, fault=f"checkpoint.{point}@{saved + SAVE_INTERVAL}:sleep=5")
        if point == "after_commit":
            wait_until(lambda saved=saved: run.newest_checkpoint() > saved, what="the commit")
        else:
            wait_until(lambda name=name: run.half_written(name), what="a half-written checkpoint")
        time.sleep(draw.uniform(0, 0.5))
        assert job.running(), job.text
        job.kill()
        assert run.newest_checkpoint() == saved + (SAVE_INTERVAL if point == "after_commit" else 0)
    assert run.half_written("weights.pth") or run.newest_checkpoint() == 2 * SAVE_INTERVAL
    start(run.folder).complete()
    assert not list(run.work.checkpoints.glob(".tmp-*"))
    assert run.result() == unbroken(_new_run, max_steps=60).result()


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_while_preparing_data(kills: int, tmp_path: Path, start: Callable[..., Job]) -> None:
    draw = random.Random(5)
    text = write_text(tmp_path / "text.jsonl", n_words=300_000).read_bytes() * 8  # enough for tokenizer processes
    runs = []
    for name in ("killed", "unbroken"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "text.jsonl").write_bytes(text)
        data = {"n_epochs_duplication": 2, "num_workers": 2}
        runs.append(new_run(folder, data=data, training={"max_steps": 4}))
    killed, unbroken = runs
    found_workers = False
    for _ in range(kills):
        leftovers = set(killed.work.data.glob(".tmp-prepare-*"))
        job = start(killed.folder)
        wait_until(
            lambda before=leftovers: bool(set(killed.work.data.glob(".tmp-prepare-*")) - before), what="the preparation"
        )
        time.sleep(draw.uniform(0, 0.3))
        workers = descendants(job.process.pid)
        found_workers = found_workers or bool(workers)
        assert not (killed.work.data / "manifest.json").exists()
        job.kill()
        wait_for_end(workers, timeout_s=10)
    assert found_workers
    for run in runs:
        start(run.folder).complete()
    assert not list(killed.work.data.glob(".tmp-*"))
    manifests = [json.loads((run.work.data / "manifest.json").read_bytes()) for run in runs]
    assert manifests[0] == manifests[1]
    assert killed.result() == unbroken.result()
