"""Asked to stop, a run saves at the next step boundary, ends with code 75, and continues without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pytorch_lightning import LightningModule, Trainer
from system.processes import Job, Watched, new_run, stopped_steps, wait_until
from tiny_run import tiny_run_config, write_config

from rwkv_cluster.errors import Preempted
from rwkv_cluster.runtime import interrupt
from rwkv_cluster.train.callbacks.ddp_fixes import StableBuckets
from rwkv_cluster.train.run import train

pytestmark = pytest.mark.system

TOTAL_STEPS = 100
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REPEATED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # by terminals, agents and Slurm


def _new_run(folder: Path) -> Watched:
    """A run that saves only when it is stopped and at its end."""
    return new_run(
        folder,
        training={"max_steps": TOTAL_STEPS, "val_interval_steps": 50},
        checkpoint={"save_interval_steps": TOTAL_STEPS},
    )


@pytest.mark.parametrize(
    "request_stop",
    [STOP_SIGNALS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in STOP_SIGNALS[1:]), "STOP"],
    ids=str,
)
def test_stops_with_75_and_continues_exactly(
    request_stop: signal.Signals | str, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path)
    job = start(run.folder)
    run.wait_for_steps(job, sessions=0, step=5)
    if isinstance(request_stop, signal.Signals):
        job.process.send_signal(request_stop)
    else:
        (run.work.root / "STOP").touch()
    assert job.wait(10) == 75
    assert stopped_steps(job.text) == {0: run.newest_checkpoint()}
    assert "same command again" in job.text
    start(run.folder).complete()
    assert run.result() == unbroken(_new_run).result()


def test_more_signals_during_the_save_change_nothing(
    unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path)
    job = start(run.folder, fault="checkpoint.after_weights:sleep=1")
    run.wait_for_steps(job, sessions=0, step=5)
    job.process.send_signal(signal.SIGTERM)
    wait_until(lambda: run.half_written("weights.pth"), what="the save")
    for number in REPEATED:
        job.process.send_signal(number)
    assert job.wait(10) == 75
    assert stopped_steps(job.text) == {0: run.newest_checkpoint()}
    start(run.folder).complete()
    assert run.result() == unbroken(_new_run).result()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_press_ends_a_save_and_costs_only_that(
    number: signal.Signals, unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path)
    job = start(run.folder, fault="checkpoint.after_weights:sleep=300")
    run.wait_for_steps(job, sessions=0, step=5)
    job.process.send_signal(number)
    wait_until(lambda: run.half_written("weights.pth"), what="the save")
    wait_until(lambda: f"{number.name} received: stopping after this step" in job.text, what="the answer")
    time.sleep(2 * interrupt.SAME_S)  # what comes earlier is the same press
    job.process.send_signal(number)
    assert job.wait(30) == 128 + number
    assert "once more: ending now" in job.text
    assert "Traceback" not in job.text
    start(run.folder).complete()
    assert run.result() == unbroken(_new_run).result()


def test_one_rank_that_is_asked_ends_the_validation_of_all(tmp_path: Path, start: Callable[..., Job]) -> None:
    runs = []
    for name in ("unbroken", "stopped"):
        training = {"max_steps": 8, "val_interval_steps": 4, "micro_bsz": 2, "timeout_s": 30}
        runs.append(new_run(tmp_path / name, training=training))
    unbroken, stopped = runs
    start(unbroken.folder, ranks=2).complete()
    job = start(stopped.folder, ranks=2, fault="train.aside@4#1:signal=SIGUSR1")
    assert job.wait() == 1  # torchrun's own
    assert stopped_steps(job.text) == {0: 4, 1: 4}
    assert stopped.newest_checkpoint() == 4
    start(stopped.folder, ranks=2).complete()
    assert stopped.result() == unbroken.result()
    assert _val_losses(stopped) == _val_losses(unbroken)


def _val_losses(run: Watched) -> list[float | None]:
    lines = (run.work.logs / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("val_loss") for line in lines]


def test_a_rank_that_waits_for_others_hears_a_signal(tmp_path: Path, start: Callable[..., Job]) -> None:
    """torch waits for them in C++, where Python runs no handler."""
    write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"timeout_s": 300}))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place["MASTER_PORT"] = str(probe.getsockname()[1])
    job = start(tmp_path, environment=place)
    wait_until(lambda: "Initializing distributed" in job.text, what="the meeting")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75
    assert "interrupted by SIGTERM" in job.text


def test_a_signal_while_the_trainer_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own handler, were it there, would end the run with code 1 and without a checkpoint."""

    def interrupt(self: StableBuckets, trainer: Trainer, module: LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StableBuckets, "on_train_start", interrupt)
    config = tiny_run_config(tmp_path)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 1 of 8"):
        train(config)
    assert Watched(tmp_path).newest_checkpoint() == 1
