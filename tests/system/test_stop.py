"""Asked to stop, a run saves at the next step boundary, ends with code 75, and continues without a trace."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from pytorch_lightning import LightningModule, Trainer
from system.processes import Job, Watched, stopped_steps, wait_until
from tiny_run import tiny_config, write_config

from rwkv_cluster.errors import Preempted
from rwkv_cluster.train.ddp import SettledBuckets
from rwkv_cluster.train.run import train

pytestmark = pytest.mark.system

TOTAL_STEPS = 200
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _new_run(folder: Path) -> Watched:
    """A run that saves only when it is stopped and at its end."""
    config = tiny_config(
        folder,
        training={"max_steps": TOTAL_STEPS, "val_interval_steps": 50},
        checkpoint={"save_interval_steps": TOTAL_STEPS},
    )
    write_config(folder / "run.yaml", config)
    return Watched(folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    run = _new_run(tmp_path_factory.mktemp("unbroken"))
    Job(run.folder).complete()
    return run


@pytest.mark.parametrize("request_stop", [*STOP_SIGNALS, "STOP"], ids=str)
def test_stops_with_75_and_continues_exactly(
    request_stop: signal.Signals | str, unbroken: Watched, tmp_path: Path, start: Callable[..., Job]
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
    assert "Run the same command again to continue" in job.text
    start(run.folder).complete()
    assert run.result() == unbroken.result()


def test_more_signals_during_the_save_change_nothing(
    unbroken: Watched, tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path)
    job = start(run.folder, fault="checkpoint.after_weights:sleep=1")
    run.wait_for_steps(job, sessions=0, step=5)
    job.process.send_signal(signal.SIGTERM)
    wait_until(lambda: run.half_written("weights.pth"), what="the save")
    for number in STOP_SIGNALS:
        job.process.send_signal(number)
    assert job.wait(10) == 75
    assert stopped_steps(job.text) == {0: run.newest_checkpoint()}
    start(run.folder).complete()
    assert run.result() == unbroken.result()


def test_a_signal_while_the_trainer_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own handler, were it there, would end the run with code 1 and without a checkpoint."""

    def interrupt(self: SettledBuckets, trainer: Trainer, module: LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SettledBuckets, "on_train_start", interrupt)
    config = tiny_config(tmp_path)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 1 of 8"):
        train(config)
    assert Watched(tmp_path).newest_checkpoint() == 1
