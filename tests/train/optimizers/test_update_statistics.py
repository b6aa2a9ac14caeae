"""Gradient noise and update-to-weight ratios against plain statements in fp64, and in runs and their report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import some_tokens, tiny_model
from tiny_run import fingerprint, tiny_run_config
from torch import nn

from rwkv_cluster.errors import Preempted
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.report import charts
from rwkv_cluster.report.run_data import read_runs
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.metrics.metrics_file import STATISTICS_COLUMNS
from rwkv_cluster.train.optimizers.update_statistics import UpdateStatistics
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

MICRO_BSZ, N_MICRO = 2, 3
BATCH = MICRO_BSZ * N_MICRO


def _flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy()


@pytest.mark.parametrize(("ranks", "loss_scale"), [(1, 1.0), (1, 1024.0), (2, 1.0)])
def test_a_step_beside_the_spread_of_its_micro_batches(
    ranks: int, loss_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """noise = b sum |g - G|^2 / (n - 1), the unbiased variance of n micro batches; signal = |G|^2 - noise / B.

    Ranks, where there are several, all have the same micro batches here.
    """
    monkeypatch.setattr(collectives, "position", lambda: (0, ranks))
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda values: ranks * values)
    model = tiny_model("x070")
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses = [next_token_loss(model, some_tokens(MICRO_BSZ, 9, seed=seed)) for seed in range(N_MICRO)]
    each = [_flat(list(torch.autograd.grad(loss, list(named.values()), retain_graph=True))) for loss in losses]
    mean = np.mean(each, axis=0)
    noise = MICRO_BSZ * ranks * sum(((gradient - mean) ** 2).sum() for gradient in each) / (ranks * N_MICRO - 1)

    statistics = UpdateStatistics(model, named.items, 4, batch=ranks * BATCH, micro_bsz=MICRO_BSZ)
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    statistics.begin(3)
    for loss in losses:
        (loss_scale * loss / N_MICRO).backward()
    for parameter in named.values():
        parameter.grad /= loss_scale
    statistics.before_update(loss_scale)
    norm = float(torch.nn.utils.clip_grad_norm_(named.values(), 0.5))
    optimizer.step()
    found = statistics.after_update(norm)

    expected = {"grad_signal": (mean**2).sum() - noise / (ranks * BATCH), "grad_noise": noise}
    for part, prefixes in (("emb", ("emb",)), ("blocks", ("blocks",)), ("head", ("head", "ln_out"))):
        names = [name for name in named if name.startswith(prefixes)]
        old, new = (_flat([weights[name] for name in names]) for weights in (before, named))
        expected[f"update_ratio_{part}"] = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert found == pytest.approx(expected, rel=1e-4)
    assert set(found) == set(STATISTICS_COLUMNS)


def test_the_means_of_many_steps_are_the_true_values() -> None:
    weight = nn.Parameter(torch.zeros(50))
    statistics = UpdateStatistics(
        nn.ParameterDict({"head": weight}), lambda: [("head", weight)], 1, batch=BATCH, micro_bsz=MICRO_BSZ
    )
    draw = torch.Generator().manual_seed(0)
    true, deviation = torch.randn(50, generator=draw), 3.0
    found = []
    for step in range(600):
        weight.grad = None
        statistics.begin(step)
        for _ in range(N_MICRO):
            samples = true + deviation * torch.randn(MICRO_BSZ, 50, generator=draw)
            (weight @ samples.mean(0) / N_MICRO).backward()
        statistics.before_update(1.0)
        assert weight.grad is not None
        found.append(statistics.after_update(float(weight.grad.norm())))
    signal, noise = (float(np.mean([numbers[name] for numbers in found])) for name in ("grad_signal", "grad_noise"))
    assert signal == pytest.approx(float(true.square().sum()), rel=0.05)
    assert noise == pytest.approx(50 * deviation**2, rel=0.05)


def test_between_steps_that_are_due_it_keeps_nothing_and_no_update_has_no_numbers() -> None:
    weight = nn.Parameter(torch.ones(3))
    copied = []

    def masters() -> list[tuple[str, torch.Tensor]]:
        copied.append(True)
        return [("emb.weight", weight)]

    statistics = UpdateStatistics(nn.ParameterList([weight]), masters, 2, batch=BATCH, micro_bsz=MICRO_BSZ)
    for step, grad_norm, numbers in ((0, 1.0, set()), (1, float("inf"), set()), (3, 1.0, {"emb"})):
        statistics.begin(step)
        weight.sum().backward()
        statistics.before_update(1.0)
        found = statistics.after_update(grad_norm)
        assert {name.removeprefix("update_ratio_") for name in found if name.startswith("update")} == numbers
        assert bool(copied) == (step > 0)


def _records(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.system
def test_a_run_with_them_is_the_same_to_the_bit_and_so_is_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"max_steps": 6, "micro_bsz": 2, "global_batch_size": 4}
    configs = {}
    for name, interval in (("plain", None), ("whole", 2), ("stopped", 2)):
        (tmp_path / name).mkdir()
        training = {**steps, "statistics_interval_steps": interval}
        configs[name] = tiny_run_config(tmp_path / name, training=training)
    train(configs["plain"])
    train(configs["whole"])
    monkeypatch.setenv(FAULT_VARIABLE, "train.step@3:signal=SIGUSR1")
    with pytest.raises(Preempted):
        train(configs["stopped"])
    monkeypatch.delenv(FAULT_VARIABLE)
    train(configs["stopped"])
    plain, whole, stopped = (tmp_path / name / "work" for name in configs)
    assert fingerprint(plain) == fingerprint(whole) == fingerprint(stopped)
    numbers = [
        [{name: record.get(name) for name in STATISTICS_COLUMNS} for record in _records(work)]
        for work in (whole, stopped)
    ]
    assert numbers[0] == numbers[1]
    assert [None not in each.values() for each in numbers[0]] == [False, True] * 3
    header = [(work / "logs" / "metrics.csv").read_text().partition("\n")[0] for work in (plain, whole)]
    assert header[1] == ",".join((header[0], *STATISTICS_COLUMNS))
    assert not any(name in record for record in _records(plain) for name in STATISTICS_COLUMNS)


@pytest.mark.system
def test_one_micro_batch_a_step_has_no_noise_which_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny_run_config(tmp_path, training={"max_steps": 2, "statistics_interval_steps": 2}))
    assert "grad_signal and grad_noise are left out" in caplog.text
    names = set(STATISTICS_COLUMNS) & set(_records(tmp_path / "work")[-1])
    assert names == {"update_ratio_emb", "update_ratio_blocks", "update_ratio_head"}


def test_the_report_divides_means(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    work.logs.mkdir(parents=True)
    lines = []
    for step in range(1, 401):
        line = {"step": step, "tokens": 10 * step, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "memory_mb": 1.0}
        if step % 2 == 0:  # one by one 20 / 1 and 60 / -0.5: a mean of 40 / 0.25 = 160
            line |= {"grad_signal": (1.0, -0.5)[step // 2 % 2], "grad_noise": (20.0, 60.0)[step // 2 % 2]}
            line |= {"update_ratio_blocks": 1e-3, "update_ratio_emb": 1e-2}
        lines.append(json.dumps(line))
    work.metrics.write_text("\n".join(lines) + "\n")
    made, (data,) = charts.make(read_runs([work]))
    by_key = {chart.key: chart for chart in made}
    (scale,) = by_key["noise_scale"].curves
    assert scale.y[-1] == pytest.approx(160, rel=0.2)
    assert {curve.label: curve.y.tolist() for curve in by_key["update_ratio"].curves} == {
        "blocks": [1e-3] * 200,
        "emb": [1e-2] * 200,
    }
    assert {"noise_scale", "update_ratio_blocks", "update_ratio_emb"} <= set(data["series"])
