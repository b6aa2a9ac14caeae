"""Kept copies of matrices change no bit: in every version, with every optimizer, after whatever changes a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VERSIONS, some_tokens, tiny_model
from tiny_run import fingerprint, tiny_run_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import Preempted
from rwkv_cluster.model.layers import Linear, LowPrecisionCopy
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.parameter_shapes import unused_names
from rwkv_cluster.model.versions.table import version_of
from rwkv_cluster.train import module
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.optimizers.low_precision import keep_copies
from rwkv_cluster.train.optimizers.param_groups import build_optimizer
from rwkv_cluster.train.optimizers.table import copied_matrices
from rwkv_cluster.train.parallel.state import replaced
from rwkv_cluster.train.run import train


def _trained(model_type: str, *, keep: bool, grad_cp: bool, optimizer: str, steps: int) -> dict[str, Tensor]:
    """Weights and moments after steps of two micro batches in bf16."""
    model = tiny_model(model_type)
    model.compute_dtype, model.grad_cp = torch.bfloat16, grad_cp
    training = TrainingConfig(precision="bf16", optimizer=optimizer, lr_init=1e-2)
    updater = build_optimizer(model, model_type, training)
    if keep:
        keep_copies(model, updater)
    for step in range(steps):
        for micro_batch in range(2):
            tokens = some_tokens(2, 9, seed=2 * step + micro_batch)
            next_token_loss(model, tokens).backward()
        updater.step()
        updater.zero_grad()
    moments = {f"{i} {key}": x for i, part in enumerate(updater.state.values()) for key, x in part.items()}
    return {**model.state_dict(), **moments}


@pytest.mark.parametrize(
    ("model_type", "grad_cp", "optimizer"),
    [
        *((model_type, grad_cp, "adamw") for model_type in VERSIONS for grad_cp in (False, True)),
        ("x070", False, "lion"),
        ("x070", False, "muon"),
    ],
)
def test_training_is_equal(model_type: str, grad_cp: bool, optimizer: str) -> None:
    steps = 20 if (model_type, grad_cp, optimizer) == ("x070", False, "adamw") else 4
    kept, cast = (
        _trained(model_type, keep=keep, grad_cp=grad_cp, optimizer=optimizer, steps=steps) for keep in (True, False)
    )
    assert kept.keys() == cast.keys()
    assert all(torch.equal(tensor, cast[name]) for name, tensor in kept.items())


class _Casts(TorchDispatchMode):
    """Memory of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ == "_to_copy":
            self.storages.add(args[0].untyped_storage().data_ptr())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", VERSIONS)
def test_no_matrix_is_cast_in_a_later_forward_pass(model_type: str) -> None:
    model = tiny_model(model_type)
    model.compute_dtype = torch.bfloat16
    updater = build_optimizer(model, model_type, TrainingConfig(precision="bf16"))
    keep_copies(model, updater)
    found = []
    for micro_batch in range(2):
        with _Casts() as casts:
            loss = next_token_loss(model, some_tokens(2, 9, seed=micro_batch))
        loss.backward()
        updater.step()
        found.append(casts.storages)
    loras = version_of(model.config).loras
    matrices = {
        name: parameter
        for name, parameter in model.named_parameters()
        if copied_matrices({name: parameter.shape}, loras) or name == "head.weight"
    }
    first, second = ({name for name, p in matrices.items() if p.data_ptr() in storages} for storages in found)
    assert first == matrices.keys() - set(unused_names())
    assert not second


def test_whatever_changes_a_weight_is_noticed() -> None:
    torch.manual_seed(0)
    layer, x = Linear(5, 4), torch.randn(3, 5, dtype=torch.bfloat16)
    layer.kept = LowPrecisionCopy()

    def require_equal() -> None:
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                assert torch.equal(layer(x), x @ layer.weight.to(x.dtype).t())

    with torch.no_grad():
        nn.init.normal_(layer.weight)
    require_equal()
    values = layer.kept.values
    require_equal()
    assert layer.kept.values is values
    layer.load_state_dict({"weight": torch.randn(4, 5)})
    require_equal()
    with torch.no_grad():
        layer.weight.mul_(2)
    require_equal()
    with replaced(layer, {"weight": torch.randn(4, 5)}):
        require_equal()
    require_equal()
    for _ in range(5):  # memory that is freed and taken again, at the same address
        layer.weight.data = torch.zeros(1)
        layer.weight.data = torch.randn(4, 5)
        require_equal()
    layer.double()
    assert torch.equal(layer(x.double()), x.double() @ layer.weight.t())
    require_equal()
    layer.bfloat16()
    assert layer.kept.of(layer.weight, torch.bfloat16) is layer.weight


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"ema_decay": 0.9}},
        pytest.param({"adapter": {"kind": "lora"}}, marks=pytest.mark.system),
        pytest.param({"training": {"train": ["*.key.weight"]}}, marks=pytest.mark.system),
    ],
)
def test_a_run_that_is_stopped_is_equal_to_one_without_copies(
    changes: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls = [], []
    monkeypatch.setattr(module, "keep_copies", lambda *arguments: (calls.append(arguments), keep_copies(*arguments)))
    for name in ("kept", "cast"):
        (tmp_path / name).mkdir()
        training = {"precision": "bf16", "micro_bsz": 2, "accumulate_grad_batches": 2, **changes.get("training", {})}
        others = {key: value for key, value in changes.items() if key != "training"}
        config = tiny_run_config(tmp_path / name, training=training, **others)
        if name == "kept":
            monkeypatch.setenv(FAULT_VARIABLE, "train.step@3:signal=SIGUSR1")
            with pytest.raises(Preempted):
                train(config)
            monkeypatch.delenv(FAULT_VARIABLE)
        else:
            monkeypatch.setattr(module, "keep_copies", lambda *arguments: None)
        train(config)
        found.append(fingerprint(config.work_dir))
    assert found[0] == found[1]
    assert len(calls) == 2
