"""Runs with each optimizer: they learn, a kill changes no bit, and a checkpoint of another one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from system.processes import Job
from tiny_run import fingerprint, losses, tiny_run_config, write_config

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.train.optimizers.table import OPTIMIZERS
from rwkv_cluster.train.run import train

pytestmark = pytest.mark.system

RATES = {"adamw": 1e-3, "adamw8bit": 1e-3, "lion": 3e-4, "muon": 3e-3}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_killed_run_ends_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    configs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        training = {"max_steps": 10, "optimizer": optimizer, "lr_init": RATES[optimizer], "ema_decay": 0.9}
        if optimizer == "adamw8bit":
            pytest.importorskip("torchao")
            training["adam_eps"] = 1e-8
        configs.append(tiny_run_config(tmp_path / name, training=training))
    whole, killed = configs
    train(whole)
    write_config(tmp_path / "killed" / "run.yaml", killed)
    job = Job(tmp_path / "killed", fault="train.step@6:signal=SIGKILL")
    assert job.wait() == -9, job.text
    train(killed)
    assert fingerprint(whole.work_dir) == fingerprint(killed.work_dir)
    curve = losses(whole.work_dir)
    assert curve[-1] < curve[0] - 0.05


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    train(tiny_run_config(tmp_path, training={"max_steps": 4}))
    with pytest.raises(ConfigError, match=r"training\.optimizer: adamw -> lion"):
        train(tiny_run_config(tmp_path, training={"max_steps": 6, "optimizer": "lion"}))
