"""The history of a run: each thing that happens is one whole line, through stops, kills and a full disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.errors import CheckpointError, Preempted, TrainingError
from rwkv_cluster.report.run_files import events as read_events
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir


def _happened(folder: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["kind"]) for event in read_events(WorkDir(folder / "work").events)]


def _last(folder: Path, kind: str) -> dict[str, Any]:
    return [event for event in read_events(WorkDir(folder / "work").events) if event["kind"] == kind][-1]


def test_a_run_that_is_stopped_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run_config(tmp_path, training={"val_interval_steps": 4})
    monkeypatch.setenv(FAULT_VARIABLE, "train.step@5:signal=SIGUSR1")
    with pytest.raises(Preempted):
        train(config)
    first = [(0, "start"), (4, "validation"), (4, "save"), (6, "save"), (6, "stop")]
    assert _happened(tmp_path) == first
    stop = _last(tmp_path, "stop")
    assert stop["exit_code"] == 75
    assert "SIGUSR1 after step 6" in stop["reason"]
    monkeypatch.delenv(FAULT_VARIABLE)
    result = train(config)
    exports = [(8, "export")] * 2  # of the epoch and of the run
    assert _happened(tmp_path) == [*first, (6, "resume"), (8, "validation"), *exports, (8, "save"), (8, "end")]
    assert _last(tmp_path, "resume")["from_step"] == 6
    assert _last(tmp_path, "validation")["loss"] == _last(tmp_path, "end")["val_loss"] == result.val_loss
    times = [event["time"] for event in read_events(WorkDir(config.work_dir).events)]
    assert times == sorted(times)


def test_what_is_not_finite_is_told_with_its_place_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run_config(tmp_path)
    monkeypatch.setenv(FAULT_VARIABLE, "train.loss@5:hit")
    with pytest.raises(TrainingError) as caught:
        train(config)
    event = _last(tmp_path, "nonfinite")
    assert (event["step"], event["what"], event["ranks"], event["losses"]) == (5, "loss", [0], ["nan"])
    assert event["samples"] == [21, 22, 23, 24]
    assert f"begin at token {', '.join(map(str, event['positions']))}." in str(caught.value)
    assert all(position % 32 == 0 for position in event["positions"])
    assert _happened(tmp_path)[-1] == (5, "stop")


def test_a_line_that_a_kill_has_cut_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1, "step": 3, "ki')
    events = Events(path)
    events.add("save", 4)
    events.add("save", 5, waited_s=float("inf"))
    assert [event["step"] for event in read_events(path)] == [4, 5]
    assert read_events(path)[1]["waited_s"] == "inf"


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Events(None).add("start", 0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_by_the_error_that_it_caused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cluster.train.metrics.events.open_own", os.open)  # which would not open a device
    events = Events(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"/dev/full cannot be written: No space left"):
        events.add("save", 4)
    with pytest.raises(TrainingError, match="its own"), events.log_exit(lambda: 4):
        raise TrainingError("its own reason")
