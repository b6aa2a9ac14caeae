"""Optimizers and the average on two ranks: those of one process, and a resume under ZeRO to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from system.processes import Job, Watched, new_run
from tiny_run import losses

from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, verify
from rwkv_cluster.train.metrics.metrics_file import STATISTICS_COLUMNS

pytestmark = pytest.mark.system

STEPS, BATCH = 8, 8
RATES = {
    "adamw": 3e-4,
    "adamw8bit": 3e-4,
    "lion": 1e-5,
    "muon": 3e-4,
}  # Lion's is small, as the sign of nearly 0 hangs on rounding


def _new_run(folder: Path, *, optimizer: str = "adamw", **training: Any) -> Watched:
    settings = {
        "max_steps": STEPS,
        "global_batch_size": BATCH,
        "micro_bsz": 2,
        "ema_decay": 0.9,
        "optimizer": optimizer,
    }
    settings["statistics_interval_steps"] = 2
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
        settings["adam_eps"] = 1e-8
    settings |= {"lr_init": RATES[optimizer], "lr_final": RATES[optimizer] / 10, **training}
    return new_run(folder, training=settings, checkpoint={"save_interval_steps": 4})


def _curve(run: Watched, key: str) -> torch.Tensor:
    records = [json.loads(line) for line in run.work.metrics.read_text().splitlines()]
    return torch.tensor([record[key] for record in records if key in record], dtype=torch.float64)


@pytest.mark.parametrize(
    ("optimizer", "training"),
    [
        ("muon", {"zero_stage": 1}),
        pytest.param("muon", {"zero_stage": 2}, marks=pytest.mark.slow),
        ("muon", {"zero_stage": 3}),
        pytest.param("muon", {"strategy": "ddp"}, marks=pytest.mark.slow),
        pytest.param("lion", {"zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param("adamw", {"zero_stage": 2}, marks=pytest.mark.slow),
        pytest.param("adamw8bit", {"strategy": "ddp"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_give_the_curve_of_one_process(
    optimizer: str, training: dict[str, Any], unbroken: Callable[..., Watched]
) -> None:
    alone, run = unbroken(_new_run, optimizer=optimizer), unbroken(_new_run, 2, optimizer=optimizer, **training)
    assert len(_curve(run, "loss")) == STEPS
    torch.testing.assert_close(_curve(run, "loss"), _curve(alone, "loss"), rtol=1e-5, atol=0)
    if training.get("zero_stage") == 3:
        assert not len(_curve(run, "val_loss_ema"))
    else:
        torch.testing.assert_close(_curve(run, "val_loss_ema"), _curve(alone, "val_loss_ema"), rtol=1e-5, atol=0)
    _check_statistics(run, alone, unbroken(_new_run, 2, optimizer="muon", zero_stage=1) if optimizer == "muon" else run)
    found, wanted = (load_pth(which.work.weights("final-ema")) for which in (run, alone))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def _check_statistics(run: Watched, alone: Watched, same_batches: Watched) -> None:
    """Updates as those of one process, and noise as under another strategy: ranks have other micro batches than one."""
    for name in STATISTICS_COLUMNS:
        other = alone if name.startswith("update_ratio") else same_batches
        assert len(_curve(run, name)) == STEPS // 2
        torch.testing.assert_close(_curve(run, name), _curve(other, name), rtol=1e-4, atol=0, msg=name)
    whole = _curve(run, "grad_signal") + _curve(run, "grad_noise") / BATCH  # |G|^2, by the formulas of both
    torch.testing.assert_close(whole.sqrt(), _curve(run, "grad_norm")[1::2], rtol=1e-5, atol=0)


def test_a_resume_on_as_many_ranks_is_equal(
    unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, optimizer="muon", zero_stage=3)
    assert start(run.folder, ranks=2, fault="train.step@6:signal=SIGKILL").wait() != 0
    start(run.folder, ranks=2).complete()
    whole = unbroken(_new_run, 2, optimizer="muon", zero_stage=3)
    assert losses(run.work.root) == losses(whole.work.root)
    assert all(torch.equal(_curve(run, name), _curve(whole, name)) for name in STATISTICS_COLUMNS)
    found, wanted = (verify(checkpoint_path(which.work.checkpoints, STEPS)) for which in (run, whole))
    for tensors, others in ((found.weights(), wanted.weights()), (found.optimizer(), wanted.optimizer())):
        assert set(tensors.keys()) == set(others.keys())
        assert all(torch.equal(tensors[name], others[name]) for name in others.keys())  # noqa: SIM118
    assert run.work.weights("final-ema").read_bytes() == whole.work.weights("final-ema").read_bytes()
