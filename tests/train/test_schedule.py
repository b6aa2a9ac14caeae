"""The learning rate: RWKV-LM's published log, the closed form, and the warm-up."""

from __future__ import annotations

import math
import random

import pytest

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.train.schedule import learning_rate

PUBLISHED = [
    0.00059975, 0.00059899, 0.00059773, 0.00059597, 0.00059371, 0.00059096,
    0.00058771, 0.00058399, 0.00057978, 0.00057511, 0.00056999, 0.00056441,
]  # fmt: skip


@pytest.mark.parametrize(("epoch", "expected"), enumerate(PUBLISHED))
def test_published_log_of_minipile(epoch: int, expected: float) -> None:
    training = TrainingConfig(lr_init=6e-4, lr_final=6e-5, warmup_steps=10)
    last_step = (epoch + 1) * 2520 - 1
    rate = learning_rate(last_step, training=training, tokens_per_step=512 * 16, horizon_tokens=1_498_226_207)
    assert f"{rate:.8f}" == f"{expected:.8f}"


def test_closed_form_at_random_steps() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        init, final = draw.uniform(1e-5, 1e-2), draw.uniform(0, 1e-3)
        warmup, per_step, total = draw.randrange(0, 50), draw.randrange(1, 10**6), draw.randrange(60, 10**5)
        step = draw.randrange(0, total)
        training = TrainingConfig(lr_init=init, lr_final=final, warmup_steps=warmup)
        rate = learning_rate(step, training=training, tokens_per_step=per_step, horizon_tokens=total * per_step)
        f = final / init
        p = min(max((step - warmup) / (total - warmup), 0), 1)
        expected = init * ((1 + f) / 2 + (1 - f) / 2 * math.cos(math.pi * p))
        expected *= 0.01 + 0.99 * step / warmup if step < warmup else 1
        assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [1, 5, 10, 11])
def test_a_run_shorter_than_its_warmup_still_warms_up(total: int) -> None:
    training = TrainingConfig(lr_init=1e-3, lr_final=1e-4, warmup_steps=10)
    rates = [learning_rate(s, training=training, tokens_per_step=8, horizon_tokens=8 * total) for s in range(total)]
    assert rates[0] == pytest.approx(1e-5)
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[: min(total, 10)] == sorted(rates[: min(total, 10)])


def test_lr_init_zero() -> None:
    training = TrainingConfig(lr_init=0.0, lr_final=1e-4, warmup_steps=0)
    assert learning_rate(10, training=training, tokens_per_step=1, horizon_tokens=10) == pytest.approx(1e-4)
