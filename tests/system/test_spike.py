"""A spike on several ranks, under DDP and ZeRO: all go back together, and a kill in between changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from system.processes import Job, Watched, new_run, wait_for_end, wait_until
from tiny_run import losses

from rwkv_cluster.report.run_files import events as read_events
from rwkv_cluster.train.checkpoint import save_load

pytestmark = pytest.mark.system

SPIKE = "train.spike@14-15:hit"


def _new_run(folder: Path, **training: Any) -> Watched:
    guard = {"spike_window_steps": 8, "spike_patience_steps": 2, "spike_lead_steps": 3, "on_spike": "rollback"}
    training = {"max_steps": 24, "micro_bsz": 2, "lr_init": 1e-4} | training
    return new_run(folder, training=training, guard=guard, checkpoint={"save_interval_steps": 4})


def _kinds(run: Watched) -> list[str]:
    """Of all events so far; the file comes with the first."""
    return [event["kind"] for event in read_events(run.work.events)] if run.work.events.exists() else []


def _with_state(path: Path, **changes: Any) -> None:
    """Change what a checkpoint's state.json says."""
    found = save_load.verify(path)
    entries = json.loads((path / "manifest.json").read_text().rpartition("}")[0] + "}")["files"]
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    files = {name: entry for name, entry in entries.items() if name != "state.json"}
    save_load.commit(copy, path, found.step, state=replace(found.state, **changes), files=files)


def _final_tensors(run: Watched) -> dict[str, bytes]:
    path = save_load.checkpoint_path(run.work.checkpoints, run.newest_checkpoint())
    return {file.name: file.read_bytes() for file in (*path.glob("*.pth"), run.work.final_weights)}


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"zero_stage": 3},
        pytest.param({"zero_stage": 2, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"devices": 2}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "zero-3", "zero-2-bf16", "no-launcher"],
)
def test_killed_after_a_rollback_it_ends_as_if_it_had_never_had_the_samples(
    training: dict[str, Any], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run, ranks = _new_run(tmp_path / "killed", **training), None if "devices" in training else 2
    job = start(run.folder, ranks=ranks, fault=SPIKE)
    wait_until(lambda: "rollback" in _kinds(run), what="the rollback")
    pids = [job.worker(rank) for rank in ((0, 1) if ranks else (1,))]
    for pid in (job.process.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    job.wait()
    wait_for_end(pids, timeout_s=20)

    shutil.copytree(run.folder, tmp_path / "never had them")
    other = Watched(tmp_path / "never had them")
    newest = save_load.checkpoint_path(other.work.checkpoints, 8)
    assert run.newest_checkpoint() == 8
    text = (other.folder / "run.yaml").read_text().replace(str(run.folder), str(other.folder))
    (other.folder / "run.yaml").write_text(text)
    state = save_load.verify(newest).state
    _with_state(newest, skipped=((11, 16),), spikes=replace(state.spikes, rollbacks=1))

    again = start(run.folder, ranks=ranks, fault=SPIKE)
    again.complete()
    assert re.search("Back to step 8, .* 5 steps from step 11 ", again.text)
    start(other.folder, ranks=ranks).complete()
    assert _kinds(run).count("rollback") == 2
    assert _kinds(other).count("rollback") == 1  # what it was copied with
    assert losses(run.work.root) == losses(other.work.root)
    assert _final_tensors(run) == _final_tensors(other)


def test_a_stop_ends_all_ranks_with_the_sentence(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path)
    job = start(run.folder, ranks=2, fault=SPIKE, arguments=["--guard.on_spike=stop"])
    assert job.wait() == 1
    for rank in (0, 1):
        assert f"rank {rank}: error: steps 14 to 15: the loss spikes" in job.text
    assert run.newest_checkpoint() == 12
    assert _kinds(run)[-2:] == ["spike", "stop"]
