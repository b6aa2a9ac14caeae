"""The predicted time of a step: its counts of a layer's tensors and operations, and what the verb says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_run_config, write_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_cluster import cli
from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels.fused import native
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model import layers as model_layers
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import VERSIONS
from rwkv_cluster.model.versions.version import Passes
from rwkv_cluster.planning.step_time import PARTS
from rwkv_cluster.runtime.gpu_specs import GPUS

C, T = 512, 64
H100 = GPUS["h100"]
PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
ALLOCATIONS = ("empty", "empty_like", "new_empty", "detach")


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Traffic(TorchDispatchMode):
    """Counts operations, and elements that those beside products and WKV read and write."""

    elements = operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        read = args, {key: value for key, value in (kwargs or {}).items() if key != "out"}
        name, given, made = op.overloadpacket.__name__, tensors(read), tensors(result)
        storages = {x.untyped_storage().data_ptr() for x in given}
        is_old = all(x.untyped_storage().data_ptr() in storages for x in made)
        is_view = is_old and not name.endswith("_") and name not in PRODUCTS
        if not (is_view or "wkv" in name or name in ALLOCATIONS):
            self.operations += 1
            self.elements += 0 if name in PRODUCTS else sum(x.numel() for x in given + made)
        return result

    def count_pass(self, arguments: Sequence[Any]) -> None:
        """A call of the library, which reads or writes each tensor once."""
        self.operations += 1
        self.elements += sum(x.numel() for x in tensors(arguments))


def measured(version: str, layers: int, batch: int, form: str, monkeypatch: Any) -> Passes:
    """Elements, not tensors, and operations of a forward pass and of both."""
    traffic, call, addresses = Traffic(), native._call, native._addresses

    def counted(name: str, x: Tensor, size: int, *arguments: Any, starts: Tensor | None = None) -> None:
        traffic.count_pass(arguments)
        passed = [addresses(argument) if isinstance(argument, Sequence) else argument for argument in arguments]
        call(name, x, size, *passed, starts=starts)

    config = ModelConfig(model_type=version, n_layer=layers, n_embd=C, vocab_size=64, head_size_a=64)
    model = RWKV(config, wkv_backend="native", fused="plain" if form == "plain" else "native")
    initialize(model, seed=1)
    model.compute_dtype = torch.bfloat16  # so that what is done to fp32 masters counts as queued
    tokens = torch.zeros(batch, T, dtype=torch.int64)
    with monkeypatch.context() as patch, traffic:
        if form == "wide":
            patch.setattr(fused, "has_norm_mix", lambda device_type, width, count: False)
        patch.setattr(native, "_addresses", list)  # the tensors themselves, until they have been counted
        patch.setattr(native, "_call", counted)
        patch.setattr(model_layers, "_goes_through_fp32", lambda x: False)  # which is for some CPUs alone
        hidden = model.hidden(tokens)
        forward = traffic.elements, traffic.operations
        hidden.sum().backward()
    return Passes(forward[0], traffic.elements, forward[1], traffic.operations)


@pytest.mark.system
@pytest.mark.parametrize("form", ["plain", "native", "wide"])
@pytest.mark.parametrize("version", list(VERSIONS))
def test_the_work_of_a_layer_is_counted(version: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ([measured(version, layers, batch, form, monkeypatch) for layers in (2, 3)] for batch in (1, 2))
    (fewer, more), (fewer_of_two, more_of_two) = one, two

    def per_token(field: str) -> int:  # what each layer and each token adds: without weights
        added = getattr(more_of_two, field) - getattr(fewer_of_two, field)
        return round((added - (getattr(more, field) - getattr(fewer, field))) / (T * C))

    found = Passes(
        per_token("forward"),
        per_token("training"),
        more.launches_forward - fewer.launches_forward,
        more.launches - fewer.launches,
    )
    row = VERSIONS[version]
    assert found == {"plain": row.passes, "native": row.passes_native, "wide": row.passes_wide}[form]


def prediction(path: Path, *options: str, capsys: Any) -> dict[str, Any]:
    assert cli.main(["plan", str(path), "--json", "--step-time", "--gpu", "h100", *options]) == 0
    return json.loads(capsys.readouterr().out)["step_time"]


def test_what_a_plan_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"accelerator": "auto"}))
    large = ("--model.n_embd=768", "--model.head_size_a=64", "--model.ctx_len=4096", "--training.micro_bsz=16")
    large += ("--training.accumulate_grad_batches=1", "--training.precision=bf16")
    kept = prediction(path, *large, "--training.grad_cp=0", capsys=capsys)
    assert kept["total"] == pytest.approx(sum(kept[part] for part in PARTS if part != "host"))
    assert kept["tokens_per_s"] == pytest.approx(16 * 4096 / kept["total"])
    again = prediction(path, *large, "--training.grad_cp=1", capsys=capsys)
    assert again["blocks"] == pytest.approx(kept["blocks"] * 4 / 3)
    assert (again["head"], again["update"]) == (kept["head"], kept["update"])
    small = prediction(path, "--model.head_size_a=16", capsys=capsys)
    assert small["wkv"] is None
    assert small["total"] == small["host"]


def test_wkv_takes_its_time_where_heads_are_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """132 multiprocessors with two blocks, or one and then 0.67 of the time, or some with two."""
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"accelerator": "auto"}))
    large = ("--model.n_embd=768", "--model.head_size_a=64", "--training.accumulate_grad_batches=1")
    full, some, none, few = (
        prediction(path, *large, f"--training.micro_bsz={rows}", capsys=capsys)["wkv"] for rows in (22, 12, 11, 2)
    )
    assert some == pytest.approx(full)
    assert none == pytest.approx(0.67 * full)
    assert few == pytest.approx(none)


def test_wkv_backward_has_one_block_where_shared_memory_is_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, 22 of 56 bytes an element, it still has two; and no GPU is faster than its memory.

    Two blocks of 72 KiB take 16 steps between barriers, and two of 114 KiB 32, at 19.3 GB/s in place of 11.64.
    """
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"accelerator": "auto"}))
    options = ("--model.n_embd=768", "--model.head_size_a=64", "--training.micro_bsz=22", "--training.precision=bf16")
    seconds = {}
    memories = ({}, {"shared_kib": 164}, {"shared_kib": 100})
    for changed in (*memories, {"bandwidth_gb_per_s": 500}, {"bandwidth_gb_per_s": 250}):
        monkeypatch.setitem(GPUS, "h100", replace(H100, **{"bandwidth_gb_per_s": 5000, **changed}))
        seconds[tuple(changed.items())] = prediction(path, *options, capsys=capsys)["wkv"]
    full, of_16_steps, one_block, slow, slower = seconds.values()
    ratio = 19.3 / (3350 * 0.78 / 1.7 / 132)
    assert of_16_steps == pytest.approx((22 + ratio * 34) / 56 * full)
    assert one_block == pytest.approx((22 + ratio * 2 * 0.67 * 34) / 56 * full)
    assert slower == pytest.approx(2 * slow)


def test_every_gpu_has_the_shared_memory_of_its_compute_capability() -> None:
    small = {name for name, gpu in GPUS.items() if gpu.shared_kib == 100}  # 8.6, 8.9 and 12.0
    assert small == {"l4", "l40s", "a10", "a6000", "rtx-3090", "rtx-4090", "rtx-5090"}
    assert {gpu.shared_kib for name, gpu in GPUS.items() if name not in small} == {164, 228}


def test_what_cannot_be_predicted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"accelerator": "auto"}))
    assert cli.main(["plan", str(path), "--step-time"]) == 2
    assert "--gpu NAME" in capsys.readouterr().err
    assert cli.main(["plan", str(path), "--step-time", "--gpu", "h100", "--training.accelerator=cpu"]) == 2
    assert "training.accelerator" in capsys.readouterr().err


def test_frozen_weights_are_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have the training precision already."""
    training = {"precision": "bf16", "accelerator": "auto"}
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training=training))
    kinds = ("none", "lora", "state")
    whole, lora, state = (prediction(path, f"--adapter.kind={kind}", capsys=capsys)["casts"] for kind in kinds)
    assert whole > lora > 0
    assert whole > state > 0
