"""Frozen matrices in int8 and nf4: codes against their definitions, products against those of the whole matrices."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import VERSIONS, add_trained_adapter, relative_error, some_tokens, tiny_model
from torch import Tensor

from rwkv_cluster.adapters.layers import adapter_names, attach, initialize_adapter
from rwkv_cluster.adapters.quantized import int8, nf4
from rwkv_cluster.adapters.quantized.matrix import QuantizedLinear
from rwkv_cluster.adapters.quantized.table import QUANTIZATIONS, is_quantized
from rwkv_cluster.adapters.table import KINDS, STATE
from rwkv_cluster.config import AdapterConfig, TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train.memory.model_states import Sharding, model_states
from rwkv_cluster.train.optimizers.param_groups import freeze
from rwkv_cluster.train.optimizers.selection import run_parameters
from rwkv_cluster.train.optimizers.table import ADAMW

SHAPE = (6, 48)  # four and a half blocks of nf4


def _weight(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE) -> Tensor:
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_nearest_value_of_each_element(dtype: torch.dtype) -> None:
    weight = _weight(dtype)
    codes, absmax = nf4.quantize(weight)
    assert (codes.dtype, absmax.dtype, len(codes), len(absmax)) == (torch.uint8, dtype, 160, 5)
    values = torch.tensor(nf4.VALUES, dtype=torch.float64)
    flat = weight.double().flatten()
    wanted = torch.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = block.abs().max()
        nearest = (block.unsqueeze(1) / largest.clamp_min(1e-30) - values).abs().argmin(1)
        wanted[start : start + 64] = values[nearest] * largest
    found = nf4.dequantize(codes, absmax, SHAPE, torch.float32).double()
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(nf4.dequantize(codes, absmax, SHAPE, dtype), found.to(dtype))
    assert not found[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_within_half_a_step_of_each_row(dtype: torch.dtype) -> None:
    weight = _weight(dtype)
    codes, absmax = int8.quantize(weight)
    assert (codes.dtype, codes.shape, absmax.dtype, absmax.shape) == (torch.int8, SHAPE, dtype, SHAPE[:1])
    step = weight.double().abs().amax(1, keepdim=True) / 127
    error = (int8.dequantize(codes, absmax, SHAPE, torch.float32).double() - weight.double()).abs()
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert codes.abs().amax(1).tolist() == [0, 127, 127, 127, 127, 127]


def test_a_large_matrix_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight()
    for module, limits in ((nf4, "BLOCKS"), (int8, "ELEMENTS")):
        whole = module.quantize(weight)
        monkeypatch.setattr(module, limits, {"cpu": 2 if module is nf4 else 100})
        parts = module.quantize(weight)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
        found = module.dequantize(*parts, SHAPE, torch.float32)
        monkeypatch.undo()
        assert torch.equal(found, module.dequantize(*whole, SHAPE, torch.float32))


@pytest.mark.system
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_has_the_same_bits(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = _weight(dtype, (96, 320))
    codes, absmax = nf4.quantize(weight)
    theirs, state = functional.quantize_nf4(weight, blocksize=64)
    assert torch.equal(codes, theirs.flatten())
    assert torch.equal(absmax.float(), state.absmax)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        matrix = nf4.dequantize(codes, absmax, (96, 320), target)
        assert torch.equal(matrix, nf4.by_bitsandbytes(codes, absmax, (96, 320), target))
    half = weight.half()  # what its int8 takes
    theirs, largest, _ = functional.int8_vectorwise_quant(half)
    codes, absmax = int8.quantize(half)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax.float(), largest)


class OnGpu(torch.Tensor):
    """A tensor that takes the ways of a GPU, and is on the CPU."""

    is_cuda = True


@pytest.mark.parametrize("fails", ["import", "call", None])
def test_a_bitsandbytes_that_does_not_work_is_left(
    fails: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose CUDA library does not load is there, and raises at its import or at the first call."""
    calls: list[tuple[int, int]] = []

    def import_module(name: str) -> ModuleType:
        calls.append((0, 0))
        raise OSError("libcudart.so.13: cannot open shared object file\n\nRun python -m bitsandbytes")

    def call(codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        calls.append(shape)
        if fails:
            raise RuntimeError("libcudart.so.13: cannot open shared object file\n\nRun python -m bitsandbytes")
        return torch.full(shape, 7, dtype=dtype)

    if fails == "import":
        monkeypatch.setattr(importlib, "import_module", import_module)
    else:
        monkeypatch.setattr(nf4, "by_bitsandbytes", call)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    nf4._bitsandbytes_works.cache_clear()
    shape = (6, 64)
    codes, absmax = nf4.quantize(_weight(shape=shape))
    expected = nf4.dequantize(codes, absmax, shape, torch.float32) if fails else torch.full(shape, 7.0)
    for _ in range(2):
        assert torch.equal(nf4.dequantize(codes.as_subclass(OnGpu), absmax, shape, torch.float32), expected)
    nf4._bitsandbytes_works.cache_clear()
    assert len(calls) == (1 if fails else 3)  # tried once
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(fails)
    assert all(line.endswith("does not work here: libcudart.so.13: cannot open shared object file") for line in lines)


def _frozen(model_type: str, adapter: AdapterConfig, dtype: torch.dtype) -> RWKV:
    """A small frozen model with an adapter, away from its initial values."""
    model = tiny_model(model_type)
    freeze(model, (), dtype)
    model.compute_dtype = dtype
    add_trained_adapter(model, adapter)
    return model


def _dequantized(model_type: str, adapter: AdapterConfig, dtype: torch.dtype) -> RWKV:
    """The same, of which the dense matrices are whole, with the values that their codes stand for."""
    plain = adapter.model_copy(update={"quant": "none"})
    model = tiny_model(model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_quantized(name, tuple(parameter.shape)):
                parameter.copy_(QuantizedLinear(parameter.to(dtype), adapter.quant).matrix.whole(dtype))
    adapted = _frozen(model_type, plain, dtype)
    adapted.load_state_dict(model.to(dtype).state_dict(), strict=False)
    return adapted


@pytest.mark.parametrize(("kind", "quant"), itertools.product([*KINDS, STATE], QUANTIZATIONS))
@pytest.mark.parametrize(("model_type", "dtype"), [("x070", torch.bfloat16), ("x060", torch.float32)])
def test_a_quantised_model_is_that_of_its_dequantised_matrices(
    kind: str, quant: str, model_type: str, dtype: torch.dtype
) -> None:
    """Losses and gradients in every bit, with grad_cp too."""
    fields: dict[str, Any] = {} if kind == STATE else {"rank": 3}
    adapter = AdapterConfig(kind=kind, quant=quant, **fields)
    model, whole = _frozen(model_type, adapter, dtype), _dequantized(model_type, adapter, dtype)
    names = adapter_names(model)
    whole.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names}, strict=False)
    tokens, results = some_tokens(2, 9), []
    for each, grad_cp in ((whole, False), (model, False), (model, True)):
        each.grad_cp = grad_cp
        each.zero_grad()
        loss = next_token_loss(each, tokens)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (wanted, by_name), *others = results
    assert by_name
    for loss, gradients in others:
        assert torch.equal(loss, wanted)
        assert gradients.keys() == by_name.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in by_name.items())


def test_no_whole_matrix_is_kept_for_the_backward_pass() -> None:
    model = _frozen("x070", AdapterConfig(kind="lora", rank=3, quant="nf4"), torch.bfloat16)
    shapes = {(32, 128), (128, 32)}  # those of the channel mix, which nothing else has
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, some_tokens(2, 9))
    assert not shapes & set(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_at_the_quantised_base(kind: str) -> None:
    adapter, tokens = AdapterConfig(kind=kind, rank=3, quant="nf4"), some_tokens(2, 9)
    model, state = (tiny_model("x070") for _ in range(2))
    attach(model, adapter)
    initialize_adapter(model, seed=0)
    attach(state, AdapterConfig(kind=STATE, quant="nf4"))
    with torch.no_grad():
        assert relative_error(model(tokens), state(tokens)) < 1e-5
        assert relative_error(model(tokens), tiny_model("x070")(tokens)) > 1e-3


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_plan_counts_its_bytes(model_type: str, quant: str) -> None:
    adapter = AdapterConfig(kind="lora", rank=3, quant=quant)
    model = _frozen(model_type, adapter, torch.bfloat16)
    assert model.config.vocab_size is not None
    parameters = run_parameters(model.config, model.config.vocab_size, TrainingConfig(), adapter)
    states = model_states(parameters.in_memory, Sharding(1), "bf16", 1, ADAMW, parameters.trained, parameters.quant)
    assert states.weights == sum(parameter.nbytes for parameter in model.parameters())


def test_weights_that_are_trained_are_not_quantised() -> None:
    with pytest.raises(ConfigError, match="quant is nf4, and kind is none"):
        AdapterConfig(quant="nf4")
