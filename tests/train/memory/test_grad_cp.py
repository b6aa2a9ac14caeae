"""`training.grad_cp: auto`: what decides it, that the run says and keeps it, and that no number depends on it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import fingerprint, tiny_run_config

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime import control_group
from rwkv_cluster.train.checkpoint.save_load import newest_verified
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.grad_cp import SHARE, choose_grad_cp
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting, needed
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir


def test_activations_are_kept_as_long_as_they_fit() -> None:
    model, training = ModelConfig("x070", 12, 768, 4096, 65536), TrainingConfig(precision="bf16")
    memory_model = MemoryModel(model, 65536, training, Kernels.of(training, model, "cuda"))
    setting = Setting(Sharding(1), grad_cp=True, micro_bsz=8)
    wanted = needed(memory_model.memory(replace(setting, grad_cp=False)))
    assert wanted > 1.5 * needed(memory_model.memory(setting))
    enough, less = (choose_grad_cp(memory_model, setting, wanted / SHARE * factor) for factor in (1.001, 0.999))
    assert (enough.grad_cp, less.grad_cp) == (0, 1)
    assert enough.needed == wanted


def test_a_run_says_its_choice_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine with less memory the same command goes on as the run began, and another run begins otherwise."""
    caplog.set_level(logging.INFO, logger="rwkv_cluster")
    results = []
    for name, memory in (("large", 64e9), ("small", 1e9)):
        monkeypatch.setattr(control_group, "memory_bytes", lambda memory=memory: memory)
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_run_config(folder, training={"grad_cp": "auto", "max_steps": 4})
        train(config)
        if name == "large":
            monkeypatch.setattr(control_group, "memory_bytes", lambda: 1e9)
        train(tiny_run_config(folder, training={"grad_cp": "auto", "max_steps": 8}))
        checkpoint = newest_verified(WorkDir(config.work_dir).checkpoints)
        assert checkpoint is not None
        assert checkpoint.step == 8
        stored = json.loads(WorkDir(config.work_dir).config_json.read_text())["training"]["grad_cp"]
        assert checkpoint.state.config["training"]["grad_cp"] == stored == int(name == "small")
        results.append(fingerprint(Path(config.work_dir)))
    said = [record.message for record in caplog.records if record.message.startswith("training.grad_cp auto is ")]
    assert [line[:27] for line in said] == ["training.grad_cp auto is 0:", "training.grad_cp auto is 1:"]
    assert results[0] == results[1]


@pytest.mark.parametrize(("given", "taken"), [(0, 0), (1, 1), (True, 1), (False, 0), ("auto", "auto")])
def test_what_the_field_takes(given: object, taken: object) -> None:
    value = TrainingConfig(grad_cp=given).grad_cp
    assert (value, type(value)) == (taken, type(taken))


@pytest.mark.parametrize("given", [2, -1, "yes", None])
def test_what_it_refuses(given: object) -> None:
    with pytest.raises(ConfigError):
        TrainingConfig(grad_cp=given)
