"""Where a step's time goes: each second in one phase, on CUDA from events read a step late, in a file for each rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_run_config

from rwkv_cluster.errors import Preempted
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.metrics.step_timer import StepTimer
from rwkv_cluster.train.metrics.step_times import StepParts, StepTimes, rewind_absent
from rwkv_cluster.train.run import train

FIELDS = ["step", "data_s", "forward_s", "backward_s", "optimizer_s", "save_s", "eval_s"]
NOTHING: Any = None  # in place of Lightning's objects, which the timer does not look at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its one number is changed."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Queue:
    """Stands in for a CUDA stream: `now` is the device's clock in ms, and nothing is finished before `done`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0.0
        self.waits = 0

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        return QueueEvent(self)


class QueueEvent:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def record(self) -> None:
        self.at = self._queue.now

    def synchronize(self) -> None:
        self._queue.waits += self.at > self._queue.done
        self._queue.done = max(self._queue.done, self.at)

    def elapsed_time(self, end: QueueEvent) -> float:
        assert end.at <= self._queue.done, "read before the device has come there"
        return end.at - self.at


def _micro_batch(timer: StepTimer, spend: Any, seconds: tuple[float, float, float, float]) -> None:
    data, forward, backward, optimizer = seconds
    spend(data)
    timer.on_train_batch_start(NOTHING, NOTHING, NOTHING, 0)
    spend(forward)
    timer.on_before_backward(NOTHING, NOTHING, NOTHING)
    spend(backward)
    timer.on_after_backward(NOTHING, NOTHING)
    spend(optimizer)
    timer.on_train_batch_end(NOTHING, NOTHING, NOTHING, NOTHING, 0)


def test_every_second_is_in_one_phase(clock: list[float]) -> None:
    def spend(seconds: float) -> None:
        clock[0] += seconds

    timer = StepTimer(on_cuda=False)
    spend(50)  # start-up is of no step
    timer.on_train_epoch_start(NOTHING, NOTHING)
    _micro_batch(timer, spend, (1, 2, 4, 0.5))
    _micro_batch(timer, spend, (1, 2, 4, 8))
    with timer.phase("other"):
        spend(0.25)
        with timer.phase("eval"):
            spend(16)
        first = timer.finish_step()
        with timer.phase("save"):
            spend(32)
    _micro_batch(timer, spend, (1, 2, 4, 8))
    second = timer.finish_step()
    assert StepParts.of(1, first) == StepParts(1, 2, 4, 8, 8.5, save_s=0, eval_s=16)
    assert StepParts.of(2, second) == StepParts(2, 1, 2, 4, 8, save_s=32, eval_s=0)
    assert first.training_s == 22.75
    assert second.training_s == 15
    assert sum(first.host_s.values()) + sum(second.host_s.values()) == clock[0] - 150


def test_on_cuda_the_device_is_asked_a_step_late(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The host hurries ahead of a slow device, which has done a step when the next one's loss is known."""
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)

    def spend(seconds: float) -> None:
        clock[0] += seconds / 100
        queue.now += seconds * 1e3

    timer, events = StepTimer(on_cuda=True), StepTimes(tmp_path / "events", 0, 0)
    timer.on_train_epoch_start(NOTHING, NOTHING)
    for step in (1, 2, 3):
        queue.done = queue.now  # by the loss of the step that begins here
        _micro_batch(timer, spend, (100, step, 4, 0.5))
        _micro_batch(timer, spend, (100, step, 4, 8))
        events.add(step, timer.finish_step())
        lines = (tmp_path / "events/rank-0.jsonl").read_text().splitlines()
        assert len(lines) == step - 1
    assert queue.waits == 0
    events.flush()
    assert queue.waits == 1
    found = [json.loads(line) for line in (tmp_path / "events/rank-0.jsonl").read_text().splitlines()]
    assert found == [
        {
            "step": n,
            "data_s": 2.0,
            "forward_s": 2.0 * n,
            "backward_s": 8.0,
            "optimizer_s": 8.5,
            "save_s": 0,
            "eval_s": 0,
        }
        for n in (1, 2, 3)
    ]
    events.close()


def _lines(work: Path, rank: int = 0) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / f"logs/events/rank-{rank}.jsonl").read_text().splitlines()]


def test_a_run_writes_what_the_timer_measured(tmp_path: Path) -> None:
    train(tiny_run_config(tmp_path, training={"val_interval_steps": 3, "micro_bsz": 2, "accumulate_grad_batches": 2}))
    work = tmp_path / "work"
    metrics = [json.loads(line) for line in (work / "logs/metrics.jsonl").read_text().splitlines()]
    lines = _lines(work)
    assert [line["step"] for line in lines] == [record["step"] for record in metrics] == list(range(1, 9))
    for line, record in zip(lines, metrics, strict=True):
        assert list(line) == FIELDS
        parts = [line[name] for name in ("data_s", "forward_s", "backward_s", "optimizer_s")]
        assert all(part > 0 for part in parts)
        step_s = 128 / record["tokens_per_s"]
        assert sum(parts) <= step_s + 5e-6  # the rest is the after_step's; each part is rounded to a microsecond
        assert (line["eval_s"] > 0) == ("val_loss" in record)
    assert [line["step"] for line in lines if line["save_s"] > 1e-3] == [5]  # after the checkpoint of step 4


@pytest.mark.parametrize("stop", [3, 5])
def test_a_continued_run_has_each_step_once(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run_config(tmp_path)
    monkeypatch.setenv(FAULT_VARIABLE, f"train.step@{stop}:signal=SIGUSR1")
    with pytest.raises(Preempted):
        train(config)
    monkeypatch.delenv(FAULT_VARIABLE)
    assert len(_lines(tmp_path / "work")) == stop + 1
    with open(tmp_path / "work/logs/events/rank-0.jsonl", "a") as file:
        file.write(json.dumps({"step": stop + 2}) + '\n{"step": 7, "data')  # as a kill before a checkpoint leaves it
    train(config)
    assert [line["step"] for line in _lines(tmp_path / "work")] == list(range(1, 9))
    assert all(list(line) == FIELDS for line in _lines(tmp_path / "work"))


def test_ranks_that_are_gone_keep_no_later_steps(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        (tmp_path / f"rank-{rank}.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    rewind_absent(tmp_path, world_size=1, start_step=3)
    assert [(tmp_path / f"rank-{rank}.jsonl").read_text().count("\n") for rank in (0, 1, 2)] == [5, 3, 3]
