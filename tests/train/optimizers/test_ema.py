"""The exponential moving average of the masters: its formula, its state, and what a run does with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import fingerprint, tiny_run_config
from torch import nn

from rwkv_cluster import cli
from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import Preempted
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.train.checkpoint.disk_space import bytes_needed_next
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.memory.model_states import Sharding, model_states
from rwkv_cluster.train.optimizers.ema import keep_ema
from rwkv_cluster.train.optimizers.selection import RunParameters
from rwkv_cluster.train.optimizers.table import ADAMW, EMA, optimizer_of
from rwkv_cluster.train.parallel.state import replaced
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

system = pytest.mark.system
DECAY = 0.75


def test_formula() -> None:
    """ema_1 = w_1, ema_t = d ema_(t-1) + (1 - d) w_t, in float64 by hand; a parameter without a gradient has none."""
    weights = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    keep_ema(optimizer, DECAY)
    expected: list[torch.Tensor] = []
    for step in range(6):
        for weight in weights[:2]:
            weight.grad = torch.full_like(weight, math.sin(step))
        optimizer.step()
        now = [weight.detach().double().clone() for weight in weights[:2]]
        expected = [DECAY * e + (1 - DECAY) * w for e, w in zip(expected, now, strict=True)] if expected else now
        for weight, average in zip(weights, expected, strict=False):
            torch.testing.assert_close(optimizer.state[weight][EMA].double(), average, rtol=1e-6, atol=1e-7)
    assert weights[2] not in optimizer.state or EMA not in optimizer.state[weights[2]]


def test_the_weights_do_not_know_of_it() -> None:
    def run(*, with_ema: bool) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(7))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        if with_ema:
            keep_ema(optimizer, DECAY)
        for step in range(4):
            weight.grad = torch.arange(7.0) - step
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(with_ema=True), run(with_ema=False))


def test_the_row_counts_it() -> None:
    """In memory, checkpoints and exports; without ema_decay the row is that of the optimizer alone."""
    with_ema = optimizer_of(TrainingConfig(ema_decay=0.9))
    assert optimizer_of(TrainingConfig()) is ADAMW
    assert with_ema.moments == (*ADAMW.moments, EMA)
    shapes = {"blocks.0.ffn.key.weight": (1000, 1000)}
    plain, more = (model_states(shapes, Sharding(1), "fp32", 1, row).moments for row in (ADAMW, with_ema))
    assert more - plain == 4_000_000
    parameters = RunParameters(shapes, shapes, {}, shapes, is_partial=False)
    plain, more = (bytes_needed_next(parameters, 2, 1, row, begins=True) for row in (ADAMW, with_ema))
    assert more - plain == pytest.approx(6_000_000, rel=0.01)


def test_replaced_gives_back_the_same_tensors() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.data_ptr()

    def fail() -> None:
        with replaced(model, {"weight": torch.zeros(2, 2)}) as is_possible:
            assert is_possible
            assert not model.weight.any()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert model.weight.data_ptr() == before
    assert model.weight.all()


def _records(work_dir: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in WorkDir(work_dir).metrics.read_text().splitlines()]


@system
def test_a_run_validates_and_exports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights as without; the exported average is that of the masters of every step."""
    every = {"checkpoint": {"save_interval_steps": 1, "keep_last": 9}}
    training = {"max_steps": 6, "val_interval_steps": 3, "val_max_tokens": 1_000_000}
    (tmp_path / "plain").mkdir()
    (tmp_path / "ema").mkdir()
    plain = tiny_run_config(tmp_path / "plain", training=training, **every)
    config = tiny_run_config(tmp_path / "ema", training={**training, "ema_decay": DECAY}, **every)
    train(plain)
    train(config)
    work, other = WorkDir(config.work_dir), WorkDir(plain.work_dir)
    assert work.final_weights.read_bytes() == other.final_weights.read_bytes()
    steps = [load_pth(work.checkpoints / f"step-{step:08d}" / "weights.pth") for step in range(1, 7)]
    exported = load_pth(work.weights("final-ema"))
    for name, first in steps[0].items():
        average = first.double()
        for weights in steps[1:]:
            average = DECAY * average + (1 - DECAY) * weights[name].double()
        torch.testing.assert_close(exported[name].double(), average, rtol=1e-5, atol=1e-7)
    records = _records(config.work_dir)
    assert [record["step"] for record in records if "val_loss_ema" in record] == [3, 6]
    assert [record["loss"] for record in records] == [record["loss"] for record in _records(plain.work_dir)]
    assert "val_loss_ema" in work.metrics_csv.read_text().splitlines()[0]
    assert "val_loss_ema" not in other.metrics_csv.read_text().splitlines()[0]
    capsys.readouterr()
    command = ["eval", str(work.root), "--weights", str(work.weights("final-ema")), "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(records[-1]["val_loss_ema"], rel=1e-6)


@system
def test_a_stop_and_a_resume_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        configs.append(tiny_run_config(tmp_path / name, training={"ema_decay": DECAY, "val_interval_steps": 3}))
    whole, stopped = configs
    train(whole)
    monkeypatch.setenv(FAULT_VARIABLE, "train.step@5:signal=SIGUSR1")
    with pytest.raises(Preempted):
        train(stopped)
    monkeypatch.delenv(FAULT_VARIABLE)
    train(stopped)
    assert fingerprint(whole.work_dir) == fingerprint(stopped.work_dir)
    whole_ema, stopped_ema = (WorkDir(config.work_dir).weights("final-ema").read_bytes() for config in configs)
    assert whole_ema == stopped_ema
    assert [record.get("val_loss_ema") for record in _records(whole.work_dir)] == [
        record.get("val_loss_ema") for record in _records(stopped.work_dir)
    ]


@system
def test_a_run_may_begin_to_average_later(tmp_path: Path) -> None:
    """From the weights that it resumes with."""
    config = tiny_run_config(tmp_path, training={"max_steps": 4})
    train(config)
    longer = tiny_run_config(tmp_path, training={"max_steps": 5, "ema_decay": DECAY})
    train(longer)
    work = WorkDir(config.work_dir)
    before, after = (load_pth(work.checkpoints / f"step-{step:08d}" / "weights.pth") for step in (4, 5))
    exported = load_pth(work.weights("final-ema"))
    for name, weights in before.items():
        expected = DECAY * weights.double() + (1 - DECAY) * after[name].double()
        torch.testing.assert_close(exported[name].double(), expected, rtol=1e-6, atol=1e-8)
