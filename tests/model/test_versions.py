"""A model version is one file and one row: one that there is not goes through all that asks about versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import rwkv_next
import torch
from tiny_models import some_tokens, tiny_model_config

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.kernels.sizes import OPERATORS
from rwkv_cluster.model.flops import flops_per_token
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.parameter_shapes import block_parameters, by_part, parameter_shapes
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import VERSIONS
from rwkv_cluster.model.weights_file import expected_shapes
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting
from rwkv_cluster.train.optimizers.param_groups import build_optimizer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A model of the version "next"; which no file may name, because `ModelType` does not."""
    monkeypatch.setitem(VERSIONS, rwkv_next.ROW.name, rwkv_next.ROW)
    return tiny_model_config("x060").model_copy(update={"model_type": "next"})


def test_a_further_version_is_counted(config: ModelConfig) -> None:
    shapes = parameter_shapes(config, 50)
    assert shapes == expected_shapes(config)
    assert by_part(shapes)["LoRAs"] == 2 * 2 * 32 * 8
    of_a_block = 5 * 32 * 32 + 2 * 32 * 64 + 2 * 32 * 8
    flops = flops_per_token(config)
    assert (flops.blocks, flops.wkv) == (2 * 2 * of_a_block, 2 * 5 * 32 * 16)
    assert block_parameters(config) > 2 * of_a_block


def test_a_further_version_is_planned(config: ModelConfig) -> None:
    training = TrainingConfig(precision="bf16")
    memory_model = MemoryModel(config, 50, training, Kernels.of(training, config, "cuda"))
    whole, checkpointed = (memory_model.memory(Setting(Sharding(1), grad_cp, 4)) for grad_cp in (False, True))
    assert 0 < checkpointed.activations < whole.activations


def test_a_further_version_is_initialised_and_trained(config: ModelConfig) -> None:
    model = RWKV(config)
    initialize(model, 1)
    optimizer = build_optimizer(model, "next", TrainingConfig(lr_init=1e-2, precision="fp32"))  # type: ignore[arg-type]
    (fast,) = (group for group in optimizer.param_groups if group["lr_multiplier"] == 3.0)
    assert fast["names"] == ["blocks.0.att.decay", "blocks.1.att.decay"]
    losses = []
    for _ in range(5):
        loss = next_token_loss(model, some_tokens(2, 9))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        whole = model(some_tokens(1, 8))
        _, state = model.forward_with_state(some_tokens(1, 8)[:, :5])
        rest, _ = model.forward_with_state(some_tokens(1, 8)[:, 5:], state)
    assert whole.shape == (1, 8, 50)
    assert rest.shape == (1, 3, 50)


def test_weights_of_a_further_version_are_recognised(config: ModelConfig) -> None:
    model = RWKV(config)
    assert rwkv_next.ROW.recognises({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    assert not any(version.recognises(expected_shapes(config)) for version in [*VERSIONS.values()][:-1])


def test_every_row_names_an_operator() -> None:
    assert {version.operator for version in VERSIONS.values()} <= set(OPERATORS)


def test_nothing_beside_the_table_and_the_configuration_asks_for_a_version() -> None:
    """In the product's model, plan and training: `model_type ==`, or the name of a version that decides something."""
    asks = re.compile(r"""model_type\s*(==|!=|in)|["']x0[567]\d?["']""")
    folders = ("model", "planning", "train", "doctor", "report")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in folders
        for path in (ROOT / "rwkv_cluster" / folder).rglob("*.py")
        if path.parent.name != "versions"
        for line in path.read_text().splitlines()
        if asks.search(line)
    }
    assert found == set()
