"""Each optimizer against a plain statement of its formula in numpy and fp64, and what its row says of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.config.schema import OptimizerName
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train.memory.model_states import Sharding, model_states
from rwkv_cluster.train.optimizers import adamw8bit as adamw8bit_module
from rwkv_cluster.train.optimizers.muon import orthogonalized
from rwkv_cluster.train.optimizers.param_groups import (
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    update_count,
)
from rwkv_cluster.train.optimizers.table import OPTIMIZERS, optimizer_of

Array = np.ndarray
RATES = (3e-3, 2e-3, 1e-3, 5e-4)
EPS = 1e-8  # of 8-bit AdamW
MATRICES = {"receptance", "key", "value", "output"}  # of x070's blocks, time mix and channel mix together


def _model(seed: int = 0) -> RWKV:
    model = RWKV(ModelConfig(model_type="x070", n_layer=2, n_embd=32, head_size_a=16, vocab_size=17))
    initialize(model, seed)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # none of them zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model


def _training(optimizer: str, **training: Any) -> TrainingConfig:
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
        training["adam_eps"] = EPS
    return TrainingConfig(precision="fp32", weight_decay=0.1, optimizer=optimizer, **training)


def _gradients(model: RWKV, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _update(model: RWKV, optimizer: torch.optim.Optimizer, step: int) -> None:
    gradients = _gradients(model, step)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    set_learning_rate(optimizer, RATES[step])
    optimizer.step()


def adamw(weight: Array, gradients: list[Array], rates: list[float], decay: float, eps: float = 1e-18) -> Array:
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + eps)
        weight = weight - lr * (direction + decay * weight)
    return weight


def lion(weight: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    m = np.zeros_like(weight)
    for gradient, lr in zip(gradients, rates, strict=True):
        weight = weight - lr * (np.sign(0.9 * m + 0.1 * gradient) + decay * weight)
        m = 0.99 * m + 0.01 * gradient
    return weight


def muon(weight: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    m = np.zeros_like(weight)
    for gradient, lr in zip(gradients, rates, strict=True):
        m = 0.95 * m + 0.05 * gradient
        x = 0.95 * m + 0.05 * gradient
        x = x / np.sqrt((x**2).sum())
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        weight = weight - lr * (0.2 * math.sqrt(max(weight.shape)) * x + decay * weight)
    return weight


def dynamic_map(*, signed: bool) -> Array:
    """256 values: 2^i or 2^(i+1) of each power of ten 10^(i-7), in the middles of equal parts, 0, and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        middles = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


def in_8_bits(moment: Array, values: Array) -> Array:
    """Each element replaced with the nearest value times the largest of its block of 256."""
    blocks = moment.reshape(-1, 256)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    upper = np.searchsorted(values, blocks / largest).clip(1, 255)
    low, high = values[upper - 1], values[upper]
    return (np.where(blocks / largest - low < (high - low) / 2, low, high) * largest).reshape(moment.shape)


def adamw8bit(weight: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    if weight.size < 4096:
        return adamw(weight, gradients, rates, decay, EPS)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + EPS)
        weight = weight - lr * (direction + decay * weight)
        m, v = in_8_bits(m, dynamic_map(signed=True)), in_8_bits(v, dynamic_map(signed=False))
    return weight


Formula = Callable[[Array, list[Array], list[float], float], Array]
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "adamw": (adamw, adamw),
    "adamw8bit": (adamw8bit, partial(adamw, eps=EPS)),
    "lion": (lion, lion),
    "muon": (muon, adamw),
}
"""Of the matrices of the blocks, and of everything else."""


def test_every_name_of_the_configuration_has_a_row_and_a_formula() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimizerName)) == set(FORMULAS)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_four_updates_in_numpy(optimizer: str) -> None:
    model = _model()
    before = {name: parameter.detach().double().numpy() for name, parameter in _model().named_parameters()}
    built = build_optimizer(model, "x070", _training(optimizer=optimizer))
    for step in range(len(RATES)):
        _update(model, built, step)
    of_matrices, of_others = FORMULAS[optimizer]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_weight = name.removesuffix(".weight").rpartition(".")[2] in MATRICES and name.endswith(".weight")
        decay = 0.1 if is_weight or name in ("emb.weight", "head.weight") else 0.0
        rates = [rate * (2 if name.endswith("att.w0") else 1) for rate in RATES]
        gradients = [_gradients(model, step)[name].double().numpy() for step in range(len(RATES))]
        formula = of_matrices if is_weight else of_others
        expected = formula(before[name], gradients, rates, decay)
        found = parameter.detach().double().numpy()
        if optimizer == "adamw8bit":  # fp32 and fp64 may round what lies between two values of the map to either
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=name)
            assert np.isclose(found, expected, rtol=1e-5, atol=2e-6).mean() > 0.999, name
            continue
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize(("dtype", "aside"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_newton_schulz_beside_the_polar_factor(shape: tuple[int, int], dtype: torch.dtype, aside: float) -> None:
    """In the basis of its singular vectors the factor is U V^T, the identity; NS gives a diagonal near 1."""
    draw = np.random.default_rng(0)
    rank = min(shape)
    u, v = (np.linalg.qr(draw.standard_normal((side, rank)))[0] for side in shape)
    matrix = u * np.geomspace(0.05, 1, rank) @ v.T
    found = orthogonalized(torch.tensor(matrix, dtype=torch.float32), dtype).double().numpy()
    assert found.shape == shape
    inner = u.T @ found @ v
    diagonal = np.diag(inner)
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.2
    assert np.abs(inner - np.diag(diagonal)).max() < aside
    np.testing.assert_allclose(u @ inner @ v.T, found, atol=aside)


def test_newton_schulz_of_zero_is_zero() -> None:
    assert not orthogonalized(torch.zeros(3, 4), torch.float32).any()


@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_its_state_survives_exactly_and_is_what_the_row_says(optimizer: str, ema: dict[str, float]) -> None:
    training = _training(optimizer=optimizer, **ema)
    unbroken, first, second = _model(), _model(), _model(1)
    whole, begun = (build_optimizer(model, "x070", training) for model in (unbroken, first))
    for step in range(4):
        _update(unbroken, whole, step)
    for step in range(2):
        _update(first, begun, step)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(begun).items()}
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, "x070", training)
    restore_optimizer(restored, tensors, update_count(begun))
    for step in range(2, 4):
        _update(second, restored, step)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), second.parameters(), strict=True))
    expected, found = optimizer_tensors(whole), optimizer_tensors(restored)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert update_count(restored) == 4

    row = optimizer_of(training)
    shapes = {name: tuple(parameter.shape) for name, parameter in unbroken.named_parameters()}
    states = model_states(shapes, Sharding(1), "fp32", 1, row)
    assert states.moments == sum(tensor.nbytes for tensor in expected.values())


def test_large_parameters_but_the_embedding_have_moments_of_a_byte() -> None:
    row = OPTIMIZERS["adamw8bit"]
    scales = ("exp_avg_scale", "exp_avg_sq_scale")
    for name, shape, moments in (
        ("blocks.0.ffn.key.weight", (64, 64), (*row.moments, *scales)),
        ("head.weight", (4096, 64), (*row.moments, *scales)),
        ("emb.weight", (4096, 64), row.moments),
        ("head.weight", (257, 64), row.moments),  # no whole blocks
        ("blocks.0.att.x_r", (1, 1, 64), row.moments),
    ):
        assert row.moments_of(name, shape) == moments
        each = 2 * (1 + 4 / 256) if len(moments) == 4 else 8
        assert row.moment_bytes({name: shape}) == math.prod(shape) * each
        assert row.with_ema().moment_bytes({name: shape}) == math.prod(shape) * (each + 4)


class OnCuda(torch.nn.Parameter):
    is_cuda = True


@pytest.mark.parametrize(("missing", "stances"), [(None, []), ("a C compiler", ["force_eager"])])
def test_8_bits_on_cuda_without_a_compiler(missing: str | None, stances: list[str], monkeypatch: Any) -> None:
    """Triton would end the run at its first update: it builds a part of itself with one."""
    given: list[str] = []
    monkeypatch.setattr(adamw8bit_module, "missing_for_compile", lambda device: missing)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: given.append(stance) or nullcontext())
    model = _model()
    optimizer: Any = build_optimizer(model, "x070", _training(optimizer="adamw8bit"))
    monkeypatch.setattr(optimizer._torchao, "step", lambda: None)
    monkeypatch.setattr(optimizer, "_as_torchao", lambda state: {})
    _update(model, optimizer, 0)
    assert given == ["force_eager"]  # on a CPU
    given.clear()
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            gradient, group["params"][number] = parameter.grad, OnCuda(parameter.detach())
            group["params"][number].grad = gradient
    monkeypatch.setattr(optimizer._adamw, "step", lambda: None)
    optimizer.step()
    assert given == stances


@pytest.mark.gpu
def test_8_bits_on_cuda_as_on_a_cpu() -> None:
    """torchao compiles its formula there."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    found = {}
    for device in ("cpu", "cuda"):
        model = _model().to(device)
        optimizer = build_optimizer(model, "x070", _training(optimizer="adamw8bit"))
        for step in range(2):
            gradients = _gradients(model, step)
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].to(device) if name in gradients else None
            set_learning_rate(optimizer, RATES[step])
            optimizer.step()
        found[device] = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    for name, wanted in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name], wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_only_muon_keeps_other_moments_for_matrices() -> None:
    model = _model()
    optimizer = build_optimizer(model, "x070", _training(optimizer="muon"))
    _update(model, optimizer, 0)
    kinds: dict[str, set[str]] = {}
    for key in optimizer_tensors(optimizer):
        moment, _, name = key.partition("/")
        kinds.setdefault(name, set()).add(moment)
    matrices = {name for name, moments in kinds.items() if moments == {"momentum"}}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in matrices} == MATRICES
    assert len(matrices) == 2 * 6
    assert all(moments == {"exp_avg", "exp_avg_sq"} for name, moments in kinds.items() if name not in matrices)
