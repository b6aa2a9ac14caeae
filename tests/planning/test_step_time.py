"""The predicted time of a step: its counts of a layer's tensors and operations, and what the verb says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_run_config, write_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rwkv_cluster import cli
from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model import layers as model_layers
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import VERSIONS
from rwkv_cluster.model.versions.version import Passes
from rwkv_cluster.planning.step_time import PARTS

C, T = 512, 64
PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
ALLOCATIONS = ("empty", "empty_like", "new_empty", "detach")


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Traffic(TorchDispatchMode):
    """Counts operations, and elements that those beside products and WKV read and write."""

    elements = operations = 0
    is_inside = False  # a pass that counts as one

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        name, given, made = op.overloadpacket.__name__, tensors((args, kwargs)), tensors(result)
        storages = {x.untyped_storage().data_ptr() for x in given}
        is_view = not name.endswith("_") and all(x.untyped_storage().data_ptr() in storages for x in made)
        if not (self.is_inside or is_view or "wkv" in name or name in ALLOCATIONS):
            self.operations += 1
            self.elements += 0 if name in PRODUCTS else sum(x.numel() for x in given + made)
        return result

    def one_pass(self, function: Callable[..., Any], given: Sequence[Tensor]) -> Any:
        """The result of a function that reads and writes its arguments and results once, whatever is inside."""
        self.is_inside = True
        result = function()
        self.is_inside = False
        self.operations += 1
        by_memory = {x.untyped_storage().data_ptr(): x.numel() for x in [*given, *tensors(result)]}
        self.elements += sum(by_memory.values())
        return result


class OnePass(torch.autograd.Function):
    """A function as it is under torch.compile: one pass forward, one pass backward."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, function: Callable[..., Any], *given: Tensor) -> Any:
        ctx.traffic, ctx.function = traffic, function
        ctx.save_for_backward(*given)
        result = traffic.one_pass(lambda: function(*given), given)
        if isinstance(result, Tensor):
            return result
        return tuple(x.detach() for x in result)  # each has a gradient of its own, also on the same memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        given = ctx.saved_tensors

        def again() -> Any:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in given]
                return torch.autograd.grad(tensors(ctx.function(*leaves)), leaves, grads)

        return None, None, *ctx.traffic.one_pass(again, [*given, *grads])


def measured(version: str, layers: int, batch: int, is_compiled: bool, monkeypatch: Any) -> Passes:
    """Elements, not tensors, and operations of a forward pass and of both."""
    traffic = Traffic()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            leaves, shape = tree_flatten(args)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

            def on_tensors(*given: Tensor) -> Any:
                full = list(leaves)
                for place, x in zip(places, given, strict=True):
                    full[place] = x
                return function(*tree_unflatten(full, shape))

            return OnePass.apply(traffic, on_tensors, *(leaves[i] for i in places))

        return run

    monkeypatch.setattr(fused, "_compiled", compiled)
    monkeypatch.setattr(model_layers, "_goes_through_fp32", lambda x: False)  # which is for some CPUs alone
    config = ModelConfig(model_type=version, n_layer=layers, n_embd=C, vocab_size=64, head_size_a=64)
    model = RWKV(config, wkv_backend="native", fused="compile" if is_compiled else "plain")
    initialize(model, seed=1)
    tokens = torch.zeros(batch, T, dtype=torch.int64)
    with traffic:
        hidden = model.hidden(tokens)
        forward = traffic.elements, traffic.operations
        hidden.sum().backward()
    return Passes(forward[0], traffic.elements, forward[1], traffic.operations)


@pytest.mark.system
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("version", list(VERSIONS))
def test_the_work_of_a_layer_is_counted(version: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ([measured(version, layers, batch, is_compiled, monkeypatch) for layers in (2, 3)] for batch in (1, 2))
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
    assert found == (VERSIONS[version].passes_compiled if is_compiled else VERSIONS[version].passes)


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
