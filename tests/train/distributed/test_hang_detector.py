"""A rank that does not go on writes its stacks; one that evaluates, saves or was suspended does not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.train.distributed import hang_detector
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.distributed.hang_detector import HangDetector
from rwkv_cluster.train.distributed.rank_monitor import RankMonitor
from rwkv_cluster.train.distributed.rank_record import RankRecord
from rwkv_cluster.train.run import train

COMPUTING = RankRecord(rank=3, host="node", pid=17, step=41, doing="computing")


class Clock:
    """In place of time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(hang_detector.time, "monotonic", lambda: self.now)

    def pass_s(self, seconds: int, watched: HangDetector, record: RankRecord = COMPUTING) -> None:
        for _ in range(seconds):
            self.now += 1.0
            watched.poll(record)


def test_stacks_are_written_once_with_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    watched = HangDetector(tmp_path / "hang" / "rank-3.txt", limit_s=10)
    clock.pass_s(9, watched)
    assert not watched.path.exists()
    clock.pass_s(30, watched)
    text = watched.path.read_text()
    sentence = "rank 3 on node, process 17, last finished step 41, .* 10 s: it is computing"
    assert len(re.findall(sentence, text)) == 1
    assert "in test_stacks_are_written_once_with_the_step" in text
    assert len(re.findall(rf"{sentence}\. .*{re.escape(str(watched.path))}", caplog.text)) == 1
    watched.reset("computing")
    clock.pass_s(30, watched)
    # The first hang is no measure for the second.
    assert len(re.findall(sentence, watched.path.read_text())) == 2


def test_slow_steps_and_pauses_are_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watched = HangDetector(tmp_path / "rank-0.txt", limit_s=10)
    for doing in ("evaluating", "saving a checkpoint", "exporting weights", "starting", "ending"):
        clock.pass_s(100, watched, replace(COMPUTING, doing=doing))
        watched.reset(doing)
    for seconds in (9, 25, 70):  # each less than three times the longest so far
        clock.pass_s(seconds, watched)
        watched.reset("computing")
    clock.now += 1e6  # suspended
    clock.pass_s(100, watched)
    assert not watched.path.exists()
    clock.pass_s(200, watched)
    assert watched.path.exists()


def test_a_rank_that_ends_while_it_is_still_writes_whatever_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    watched = HangDetector(tmp_path / "rank-0.txt", limit_s=10)
    saving = replace(COMPUTING, doing="saving a checkpoint")
    clock.pass_s(9, watched, saving)
    watched.write(saving)
    assert not watched.path.exists()
    clock.pass_s(1, watched, saving)
    watched.write(saving)
    assert "it is saving a checkpoint" in watched.path.read_text()


def test_what_a_run_says_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the hang_detector's clock stands still in evaluations and checkpoints."""
    said: list[str] = []
    set_activity = RankMonitor.set_activity

    def noted(rank_monitor: RankMonitor, doing: str, **facts: Any) -> None:
        said.append(doing)
        set_activity(rank_monitor, doing, **facts)

    monkeypatch.setattr(RankMonitor, "set_activity", noted)
    train(tiny_run_config(tmp_path, training={"max_steps": 2}))
    steps = ["loading data", "computing", "loading data", "computing"]
    assert said[:-2] == [*steps, "evaluating", "exporting weights", "exporting weights", "saving a checkpoint"]
    assert said[-1] == "ending"


@pytest.mark.system
def test_a_run_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An endless wait for data, which comes at last."""
    monkeypatch.setenv(FAULT_VARIABLE, "data.batch@2:sleep=6")
    assert train(tiny_run_config(tmp_path, guard={"hang_timeout_s": 1}, training={"max_steps": 3})).step == 3
    text = (tmp_path / "work" / "logs" / "hang" / "rank-0.txt").read_text()
    assert "last finished step 2, " in text
    assert "in fault_point" in text
    assert re.search(r"it is loading data\. .*hang/rank-0\.txt", caplog.text)
