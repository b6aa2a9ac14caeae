"""TensorBoard and Weights & Biases: present they get the run's numbers, absent they are asked for at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import losses, tiny_config

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.train.run import train


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, logging={"tensorboard": True})
    train(config)
    events = EventAccumulator(str(tmp_path / "work/logs/tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 9))
    assert [scalar.value for scalar in scalars] == pytest.approx(losses(config.work_dir), rel=1e-6)


@pytest.mark.parametrize(
    ("package", "setting"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb_project": "mine"})]
)
def test_a_missing_package_is_said_before_anything_is_written(
    package: str, setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without the extra: the package cannot be found."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=rf"{package} is not installed.*pip install 'rwkv-cluster\[{package}\]'"):
        train(tiny_config(tmp_path, logging=setting))
    assert not (tmp_path / "work").exists()
