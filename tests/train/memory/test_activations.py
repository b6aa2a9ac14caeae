"""Activations and peaks that are predicted, beside what autograd really saves and what is really allocated."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from real_memory import model_of, peak_bytes, saved_bytes, some_batch
from tiny_models import VERSIONS
from tiny_run import tiny_run_config

from rwkv_cluster.adapters.layers import attach, initialize_adapter
from rwkv_cluster.config import AdapterConfig, ModelConfig, TrainingConfig
from rwkv_cluster.kernels import loader, native
from rwkv_cluster.model import layers
from rwkv_cluster.planning.options import Assumptions
from rwkv_cluster.planning.run_plan import plan_run
from rwkv_cluster.train.memory.activations import Kernels, _torch_sums_products, activations
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting
from rwkv_cluster.train.optimizers.param_groups import freeze
from rwkv_cluster.train.run import train

FORMS = {"chunked": "plain", "native": "native"}  # WKV: what else computes a block
needs_library = pytest.mark.skipif(isinstance(loader.cpu(), loader.Missing), reason="no compiled CPU library")
forms = [pytest.param("chunked"), pytest.param("native", marks=needs_library)]


def _config(model_type: str, **fields: int) -> ModelConfig:
    sizes = {"n_layer": 3, "n_embd": 192, "head_size_a": 64, "ctx_len": 96, "vocab_size": 500}
    return ModelConfig(model_type=model_type, **{**sizes, **fields})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wkv", forms)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_what_autograd_saves(model_type: str, wkv: str, precision: str) -> None:
    """3 %: statistics of norms, vectors, and strided parts that a CPU's fp32 product copies are left out."""
    wide = {} if model_type == "x070" else {"dim_att": 256}
    config, batch_size = _config(model_type, **wide), 2
    model = model_of(config, precision, wkv=wkv, fused=FORMS[wkv])
    kernels = Kernels("cpu", wkv, FORMS[wkv])
    found = activations(config, 500, kernels, micro_bsz=batch_size, precision=precision, bf16_parameters=False)
    assert found.saved(grad_cp=False) == pytest.approx(saved_bytes(model, some_batch(config, batch_size)), rel=0.03)


@pytest.mark.parametrize(("wkv", "kernel"), [("native", native.EXACT), ("tensor_cores", native.TENSOR_CORES)])
@pytest.mark.parametrize("model_type", VERSIONS)
def test_states_of_wkv_are_the_kernels(model_type: str, wkv: str, kernel: int) -> None:
    config = _config(model_type, ctx_len=100)
    found = activations(
        config, 500, Kernels("cuda", wkv, "compile"), micro_bsz=2, precision="bf16", bf16_parameters=True
    )
    version = 7 if model_type == "x070" else 6
    assert found.wkv == 3 * native.saved_bytes(version, (2, 100, 3, 64), kernel)


@pytest.mark.parametrize("model_type", VERSIONS)
def test_what_the_time_loop_saves(model_type: str) -> None:
    """10 %: the state of every token, and a little for each step that is not counted."""
    config = _config(model_type, n_layer=1, ctx_len=24)
    model = model_of(config, "bf16", wkv="reference", fused="plain")
    kernels = Kernels("cpu", "reference", "plain")
    found = activations(config, 500, kernels, micro_bsz=2, precision="bf16", bf16_parameters=False)
    assert found.saved(grad_cp=False) == pytest.approx(saved_bytes(model, some_batch(config, 2)), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", VERSIONS)
def test_what_autograd_saves_of_compiled_blocks(model_type: str) -> None:
    """The form of a GPU: torch.compile decides on any device alike what to recompute."""
    config = _config(model_type)
    model = model_of(config, "bf16", wkv="native", fused="compile")
    kernels = Kernels("cpu", "native", "compile")
    found = activations(config, 500, kernels, micro_bsz=2, precision="bf16", bf16_parameters=False)
    assert found.saved(grad_cp=False) == pytest.approx(saved_bytes(model, some_batch(config, 2)), rel=0.03)


@needs_library
@pytest.mark.parametrize(
    ("model_type", "precision", "grad_cp"),
    [("x070", "bf16", False), ("x070", "bf16", True), ("x070", "fp32", True), ("x060", "bf16", True),
     ("x060", "fp32", False), ("x052", "fp32", True), ("x052", "bf16", False)],
)  # fmt: skip
def test_the_peak_of_a_step(model_type: str, precision: str, grad_cp: bool) -> None:
    """15 %, with parameters and moments, on one rank."""
    config, training = _config(model_type, n_embd=128, ctx_len=128), TrainingConfig(precision=precision)
    model = model_of(config, precision, wkv="native", fused="native", grad_cp=grad_cp)
    real = peak_bytes(model, some_batch(config, 4), training)
    memory_model = MemoryModel(config, 500, training, Kernels("cpu", "native", "native"))
    assert memory_model.memory(Setting(Sharding(1), grad_cp, 4)).peak == pytest.approx(real, rel=0.15)


@needs_library
@pytest.mark.parametrize(("model_type", "ctx_len"), [("x070", 128), ("x060", 64), ("x052", 16)])
def test_the_peak_of_a_step_that_keeps_copies_of_matrices(model_type: str, ctx_len: int) -> None:
    """15 %."""
    config, training = _config(model_type, n_embd=128, ctx_len=ctx_len), TrainingConfig(precision="bf16")
    model = model_of(config, "bf16", wkv="native", fused="native")
    real = peak_bytes(model, some_batch(config, 4), training, micro_batches=2)
    memory_model = MemoryModel(config, 500, training, Kernels("cpu", "native", "native"))
    memory = memory_model.memory(Setting(Sharding(1), False, 4, accumulates=True))
    assert memory.peak == pytest.approx(real, rel=0.15)
    assert memory.states.weights > memory_model.memory(Setting(Sharding(1), False, 4)).states.weights


@needs_library
@pytest.mark.parametrize("grad_cp", [False, True])
def test_the_peak_where_the_head_is_most_of_it(grad_cp: bool) -> None:
    """15 %."""
    config, training = _config("x070", n_embd=128, ctx_len=64, vocab_size=8000), TrainingConfig(precision="bf16")
    real = peak_bytes(
        model_of(config, "bf16", wkv="native", fused="native", grad_cp=grad_cp), some_batch(config, 2), training
    )
    memory = MemoryModel(config, 8000, training, Kernels("cpu", "native", "native")).memory(
        Setting(Sharding(1), grad_cp, 2)
    )
    assert memory.peak_at == "head"
    assert memory.peak == pytest.approx(real, rel=0.15)


@needs_library
@pytest.mark.parametrize(
    ("kind", "model_type", "grad_cp", "quant"),
    [*itertools.product(["lora", "dora", "pissa", "miss", "state"], ["x070"], [False, True], ["none"]),
     ("lora", "x060", False, "none"), ("state", "x060", True, "none"), ("lora", "x052", True, "none"),
     ("state", "x052", False, "none"), ("lora", "x070", True, "nf4"), ("state", "x070", False, "int8")],
)  # fmt: skip
def test_the_peak_of_an_adapters_step(
    kind: str, model_type: str, grad_cp: bool, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 %, with the frozen base in bf16, whose products go through fp32 as on most CPUs."""
    monkeypatch.setattr(layers, "_has_half_units", lambda: False)
    config, training = _config(model_type, n_embd=256, ctx_len=128), TrainingConfig()
    adapter = AdapterConfig(kind=kind, quant=quant)
    model = model_of(config, "bf16", wkv="native", fused="native", grad_cp=grad_cp)
    freeze(model, (), torch.bfloat16)
    attach(model, adapter)
    initialize_adapter(model, 0)
    real = peak_bytes(model, some_batch(config, 4), training)
    memory_model = MemoryModel(config, 500, training, Kernels("cpu", "native", "native"), adapter)
    predicted = memory_model.memory(Setting(Sharding(1), grad_cp, 4)).peak
    case = f"{kind} {model_type} {int(grad_cp)} {quant}"
    print(f"{case}: predicted {predicted / 1e6:.2f} MB, measured {real / 1e6:.2f} MB")
    assert predicted == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(("precision", "item"), [("bf16", 2), ("fp32", 4)])
def test_the_loss_of_a_gpu_needs_its_logits_alone_where_the_library_is(precision: str, item: int) -> None:
    """Else softmax in fp32, and a copy of its gradient in bf16."""
    with_library, without = (
        activations(
            _config("x070"), 500, Kernels("cuda", "chunked", "plain", has_loss, sums_products=False), micro_bsz=2,
            precision=precision, bf16_parameters=True,
        ).head
        for has_loss in (True, False)
    )  # fmt: skip
    assert without - with_library == 2 * 96 * 500 * (4 if item == 4 else 4 + 2)
    assert with_library - 500 * 192 * item == 2 * 96 * 500 * item


@pytest.mark.parametrize(
    ("device", "precision", "item"), [("cuda", "bf16", 2), ("cuda", "fp16", 2), ("cuda", "fp32", 0), ("cpu", "bf16", 0)]
)
def test_a_product_that_a_gpu_adds_in_place_is_not_counted(device: str, precision: str, item: int) -> None:
    """As the loss does it: in two bytes, on a GPU, from torch 2.10 on."""
    made, added = (
        activations(
            _config("x070"),
            500,
            Kernels(device, "chunked", "plain", sums_products=sums),
            micro_bsz=2,
            precision=precision,
            bf16_parameters=False,
        ).head
        for sums in (False, True)
    )
    assert made - added == 500 * 192 * item


@pytest.mark.parametrize(("torch_version", "sums"), [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True)])
def test_which_torch_adds_products_in_place(torch_version: str, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cluster.train.memory.activations.version", lambda _: torch_version)
    _torch_sums_products.cache_clear()
    assert Kernels.of(TrainingConfig(), _config("x070"), "cuda").sums_products == sums
    _torch_sums_products.cache_clear()


def test_kernels_are_those_that_auto_takes() -> None:
    model = ModelConfig(n_embd=128, head_size_a=64)
    assert Kernels.of(TrainingConfig(precision="bf16"), model, "cuda") == Kernels("cuda", "tensor_cores", "native")
    assert Kernels.of(TrainingConfig(precision="fp32"), model, "cuda") == Kernels("cuda", "native", "native")
    assert Kernels.of(TrainingConfig(precision="bf16"), model, "cpu") == Kernels("cpu", "native", "native")
    exact = TrainingConfig(precision="bf16", wkv_backend="exact", fused="plain")
    assert Kernels.of(exact, model, "cuda") == Kernels("cuda", "native", "plain")
    for size in (32, 128):
        model = ModelConfig(n_embd=128, head_size_a=size)
        assert Kernels.of(TrainingConfig(precision="bf16"), model, "cuda") == Kernels("cuda", "native", "native")
    odd = ModelConfig(n_embd=120, head_size_a=24, dim_ffn=100)
    assert Kernels.of(TrainingConfig(), odd, "cuda") == Kernels("cuda", "chunked", "compile")
    assert Kernels.of(TrainingConfig(), odd, "cpu") == Kernels("cpu", "native", "plain")


@pytest.mark.gpu
@pytest.mark.parametrize("grad_cp", [0, 1])
@pytest.mark.parametrize("model_type", VERSIONS)
def test_the_peak_on_a_gpu(model_type: str, grad_cp: int, tmp_path: Path) -> None:
    """15 %, of the allocator's own peak as a real run records it."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    model = {"model_type": model_type, "n_layer": 8, "n_embd": 1024, "head_size_a": 64, "ctx_len": 512}
    training = {"accelerator": "cuda", "precision": "bf16", "micro_bsz": 4, "grad_cp": grad_cp, "max_steps": 4}
    config = tiny_run_config(tmp_path, model={**model, "vocab_size": 65536}, training=training)
    train(config)
    lines = (tmp_path / "work/logs/metrics.jsonl").read_text().splitlines()
    measured = max(json.loads(line)["memory_mb"] for line in lines)
    predicted = plan_run(config, Assumptions(1, None, None, None, None)).configured.memory.peak / 1e6
    print(f"{model_type} grad_cp {grad_cp}: predicted {predicted:,.0f} MB, measured {measured:,.0f} MB")
    assert predicted == pytest.approx(measured, rel=0.15)
