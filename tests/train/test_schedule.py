"""The learning rate: RWKV-LM's published log, each schedule's closed form, and the warm-up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from rwkv_cluster.config import Config, TrainingConfig
from rwkv_cluster.config.loader import dump_yaml, load_config
from rwkv_cluster.config.schema import InvalidFields, ScheduleName
from rwkv_cluster.train.schedule import DECAY_SHAPES, SCHEDULES, decay_is_cut, learning_rate, turning_steps

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
    run = [learning_rate(s, training=training, tokens_per_step=8, horizon_tokens=8 * total) for s in range(total)]
    assert run[0] == pytest.approx(1e-5)
    assert all(0 < rate <= 1e-3 for rate in run)
    assert run[: min(total, 10)] == sorted(run[: min(total, 10)])


def test_lr_init_zero() -> None:
    training = TrainingConfig(lr_init=0.0, lr_final=1e-4, warmup_steps=0)
    assert learning_rate(10, training=training, tokens_per_step=1, horizon_tokens=10) == pytest.approx(1e-4)


def rates(total: int, per_step: int = 8, horizon_tokens: int | None = None, **training: Any) -> list[float]:
    """Rates of every step of a run of `total` steps."""
    config, end = TrainingConfig(**training), horizon_tokens or total * per_step
    return [learning_rate(step, training=config, tokens_per_step=per_step, horizon_tokens=end) for step in range(total)]


def test_the_default_is_rwkv_lm_s_cosine_to_the_bit() -> None:
    """As the trainer states it (RWKV-LM `src/trainer.py`), in its order of operations."""
    draw = random.Random(1)
    for _ in range(300):
        init, final = draw.uniform(1e-5, 1e-2), draw.uniform(0, 1e-3)
        warmup, per_step, total = draw.randrange(0, 50), draw.randrange(1, 10**6), draw.randrange(60, 10**5)
        step, end = draw.randrange(0, total), total * per_step - draw.randrange(per_step)
        training = TrainingConfig(lr_init=init, lr_final=final, warmup_steps=warmup)
        done = (step * per_step - warmup * per_step) / (end - warmup * per_step)
        expected = (init + final) / 2 + (init - final) / 2 * math.cos(math.pi * max(0, min(1, done)))
        if step < warmup:
            expected = expected * (0.01 + 0.99 * step / warmup)
        assert learning_rate(step, training=training, tokens_per_step=per_step, horizon_tokens=end) == expected


def test_every_name_of_the_configuration_has_a_row() -> None:
    assert set(SCHEDULES) == set(get_args(ScheduleName))
    shapes = get_args(get_args(TrainingConfig.model_fields["decay_shape"].annotation)[0])
    assert set(DECAY_SHAPES) == set(shapes)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_warms_up_from_a_hundredth(schedule: str) -> None:
    points = {"lr_points": [[0, 1e-3]]} if schedule == "points" else {}
    plain, warm = (
        rates(100, schedule=schedule, lr_init=1e-3, lr_final=1e-4, warmup_steps=steps, **points) for steps in (0, 10)
    )
    assert warm[0] == pytest.approx(0.01 * plain[0])
    assert warm[5] == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert warm[10] == plain[0] == 1e-3


def test_warm_up_in_tokens() -> None:
    by_tokens = rates(40, warmup_tokens=80, lr_init=1e-3, lr_final=1e-4)
    assert by_tokens == pytest.approx(rates(40, warmup_steps=10, lr_init=1e-3, lr_final=1e-4), rel=1e-14)
    assert rates(40, per_step=7, warmup_tokens=10, schedule="constant", lr_init=1.0)[:3] == [0.01, 0.01 + 0.99 * 0.7, 1]


def test_linear_and_constant() -> None:
    line = rates(10, schedule="linear", lr_init=1.0, lr_final=0.5, warmup_steps=2)
    assert line[2:] == pytest.approx([1 - 0.5 * step / 8 for step in range(8)])
    assert set(rates(10, schedule="constant", lr_init=0.3, warmup_steps=0)) == {0.3}


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda p: 1 - p),
        ("1-sqrt", lambda p: 1 - math.sqrt(p)),
        ("cosine", lambda p: 0.5 * (1 + math.cos(math.pi * p))),
    ],
)
@pytest.mark.parametrize("length", [{"decay_steps": 20}, {"decay_tokens": 160}, {}])
def test_wsd_is_flat_and_then_falls(shape: str, left: Callable[[float], float], length: dict[str, int]) -> None:
    run = rates(100, schedule="wsd", lr_init=0.7, lr_final=0.1, warmup_steps=5, decay_shape=shape, **length)
    assert set(run[5:81]) == {0.7}
    assert run[80:] == pytest.approx([0.1 + 0.6 * left(step / 20) for step in range(20)], rel=1e-12)
    training = TrainingConfig(schedule="wsd", lr_init=0.7, lr_final=0.1, **length)
    assert learning_rate(100, training=training, tokens_per_step=8, horizon_tokens=800) == 0.1


def test_a_branch_has_the_rates_of_the_run_that_decays_at_once() -> None:
    """The trunk's, wherever it ends, up to the branch; then the same decay."""
    trunk = rates(100, schedule="wsd", lr_init=0.7)
    at_once = rates(50, schedule="wsd", lr_init=0.7, decay_steps=10)
    assert at_once[:40] == trunk[:40] == rates(1000, schedule="constant", lr_init=0.7)[:40]


def test_a_decay_longer_than_the_run_begins_where_warm_up_ends() -> None:
    run = rates(20, schedule="wsd", lr_init=1.0, lr_final=0.0, warmup_steps=10, decay_steps=500, decay_shape="linear")
    assert run[10:] == pytest.approx([1 - step / 10 for step in range(10)])
    cut = {
        length: decay_is_cut(TrainingConfig(schedule="wsd", warmup_steps=10, decay_steps=length), 8, 8 * 20)
        for length in (None, 10, 11)
    }
    assert cut == {None: False, 10: False, 11: True}


def test_points_are_joined_by_lines() -> None:
    points = [[16, 1.0], [32, 0.5], [48, 0.75]]
    run = rates(8, schedule="points", warmup_steps=0, lr_points=points)
    assert run == [1.0, 1.0, 1.0, 0.75, 0.5, 0.625, 0.75, 0.75]


def test_turning_steps() -> None:
    def turns(**training: Any) -> list[int]:
        return turning_steps(TrainingConfig(**training), 8, 800)

    assert turns() == [10]
    assert turns(schedule="wsd", decay_tokens=161) == [10, 80]
    assert turns(schedule="points", lr_points=[[0, 1], [401, 2], [1000, 1]]) == [10, 0, 51]
    assert turns(warmup_steps=1000) == []


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"schedule": "points"}, "schedule points needs lr_points"),
        (
            {"decay_steps": 5},
            "decay_steps is set, which schedule cosine does not use. Remove it, or set schedule to wsd",
        ),
        ({"schedule": "wsd", "lr_points": [[0, 1]]}, "lr_points is set, which schedule wsd does not use"),
        ({"schedule": "wsd", "decay_steps": 5, "decay_tokens": 5}, "decay_steps or decay_tokens, not both"),
        ({"schedule": "points", "lr_points": [[5, 1], [5, 2]]}, "do not ascend"),
        ({"schedule": "points", "lr_points": [[5, 1], [6]]}, r"lr_points has \[6.0\]"),
        ({"schedule": "points", "lr_points": [[5, -1]]}, r"lr_points has \[5.0, -1.0\]"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(training: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidFields, match=words):
        TrainingConfig(**training)


def test_points_survive_yaml(tmp_path: Path) -> None:
    config = Config(training=TrainingConfig(schedule="points", lr_points=[[0, 1e-5], [1e9, 3.3e-4]]))
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "run.yaml") == config
    decay = load_config(tmp_path / "run.yaml", ["--training={schedule: wsd, lr_points: null, decay_shape: 1-sqrt}"])
    assert decay.training.decay_shape == "1-sqrt"
