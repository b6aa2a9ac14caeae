"""Parameter groups by name, and AdamW's state as named tensors."""

from __future__ import annotations

import adagrad
import pytest
import torch

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train.checkpoint.disk_space import checkpoint_bytes
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting
from rwkv_cluster.train.optimizers.adamw import group_of
from rwkv_cluster.train.optimizers.param_groups import (
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    update_count,
)
from rwkv_cluster.train.optimizers.table import ADAMW

TRAINING = TrainingConfig(lr_init=1e-3, weight_decay=0.1)


def _model(model_type: str, n_layer: int = 2) -> RWKV:
    model = RWKV(ModelConfig(model_type=model_type, n_layer=n_layer, n_embd=32, head_size_a=16, vocab_size=17))
    initialize(model, 0)
    return model


DECAYED = {
    "x052": {"att.receptance", "att.key", "att.value", "att.gate", "att.output"}
    | {"ffn.key", "ffn.receptance", "ffn.value"},
    "x070": {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"},
}
DECAYED["x060"] = DECAYED["x052"]
DOUBLED = {"x052": "time_decay", "x060": "time_decay", "x070": "w0"}


@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
def test_membership(model_type: str) -> None:
    for name, parameter in _model(model_type).named_parameters():
        multiplier, decays = group_of(name, parameter, model_type)
        short = name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("blocks") else name
        assert decays == (short in DECAYED[model_type] or name in ("emb.weight", "head.weight")), name
        assert multiplier == (2.0 if name.endswith(f"att.{DOUBLED[model_type]}") else 1.0), name


def test_layerwise_lr_can_be_switched_off() -> None:
    assert group_of("blocks.0.att.w0", torch.zeros(1, 1, 4), "x070", layerwise_lr=False) == (1.0, False)


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = _model("x070")
    optimizer = build_optimizer(model, "x070", TRAINING)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert "blocks.0.att.v0" not in names
    assert "blocks.1.att.v0" in names


def test_learning_rate_reaches_each_group_with_its_multiplier() -> None:
    optimizer = build_optimizer(_model("x070"), "x070", TRAINING)
    set_learning_rate(optimizer, 0.5)
    assert {(g["lr_multiplier"], g["lr"]) for g in optimizer.param_groups} == {(1.0, 0.5), (2.0, 1.0)}


def test_update_is_adam_with_decoupled_decay() -> None:
    """p - lr (m̂ / (√v̂ + eps) + wd p), in float64 by hand."""
    model = _model("x070", n_layer=1)
    optimizer = build_optimizer(model, "x070", TRAINING)
    set_learning_rate(optimizer, 1e-2)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            gradient = parameter.grad.double()
            m, v = (1 - 0.9) * gradient, (1 - 0.99) * gradient**2
            step = (m / (1 - 0.9)) / ((v / (1 - 0.99)).sqrt() + 1e-18) + group["weight_decay"] * before[name]
            torch.testing.assert_close(
                parameter.detach().double(), before[name] - group["lr"] * step, rtol=1e-5, atol=1e-7
            )


def test_a_zero_gradient_moves_nothing() -> None:
    model = _model("x070", n_layer=1)
    optimizer = build_optimizer(model, "x070", TrainingConfig(weight_decay=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_state_survives_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [
        {n: torch.randn(p.shape, generator=generator) for n, p in _model("x070").named_parameters()} for _ in range(4)
    ]

    def run(model: RWKV, optimizer: torch.optim.Optimizer, steps: list[dict[str, torch.Tensor]]) -> None:
        for step in steps:
            for name, parameter in model.named_parameters():
                parameter.grad = step[name].clone() if parameter.requires_grad else None
            optimizer.step()

    unbroken = _model("x070")
    run(unbroken, build_optimizer(unbroken, "x070", TRAINING), gradients)

    first = _model("x070")
    optimizer = build_optimizer(first, "x070", TRAINING)
    run(first, optimizer, gradients[:2])
    second = _model("x070")
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, "x070", TRAINING)
    restore_optimizer(restored, optimizer_tensors(optimizer), update_count(optimizer))
    run(second, restored, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), second.parameters(), strict=True))


def test_a_state_that_lacks_a_moment_or_has_one_of_another_shape_is_refused() -> None:
    model = _model("x070")
    optimizer = build_optimizer(model, "x070", TRAINING)
    whole = {
        f"{moment}/{name}": torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
        for moment in ADAMW.moments
    }
    restore_optimizer(optimizer, whole, 1)
    key = "exp_avg_sq/blocks.1.ffn.key.weight"
    with pytest.raises(CheckpointError, match=f"optimizer has no {key}"):
        restore_optimizer(optimizer, {name: tensor for name, tensor in whole.items() if name != key}, 1)
    with pytest.raises(CheckpointError, match=rf"{key} .*optimizer is \(3, 2\), the model has"):
        restore_optimizer(optimizer, whole | {key: torch.zeros(3, 2)}, 1)


def test_a_further_optimizer_is_a_row_and_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, state as named tensors and back, disk space, and the plan's moments follow what the row says."""
    for reader in ("rwkv_cluster.train.optimizers.param_groups", "rwkv_cluster.train.memory.peak"):
        monkeypatch.setattr(f"{reader}.optimizer_of", lambda training: adagrad.ROW)
    model = _model("x070")
    optimizer = build_optimizer(model, "x070", TRAINING)
    _update(model, optimizer, seed=0)
    tensors = optimizer_tensors(optimizer)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(tensors) == {f"sum/{name}" for name, _ in trained}

    again = _model("x070")
    again.load_state_dict(model.state_dict())
    restored = build_optimizer(again, "x070", TRAINING)
    restore_optimizer(restored, tensors, update_count(optimizer))
    _update(model, optimizer, seed=1)
    _update(again, restored, seed=1)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in again.state_dict().items())

    elements = sum(parameter.numel() for _, parameter in trained)
    memory_model = MemoryModel(model.config, 17, TRAINING, Kernels("cpu", "native", "native"))
    assert memory_model.memory(Setting(Sharding(1), False, 1)).states.moments == 4 * elements
    shapes = {"emb.weight": (1000, 1000)}
    assert checkpoint_bytes(shapes, 1, adagrad.ROW) == pytest.approx(8_000_000, rel=0.01)


def _update(model: RWKV, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One update by random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
    optimizer.step()
