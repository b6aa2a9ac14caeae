"""What one optimizer step asks of the device, and what it leaves when its numbers are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_run_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_cluster.errors import TrainingError
from rwkv_cluster.train.callbacks.after_step import AfterStep
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.module import TrainingModule
from rwkv_cluster.train.run import train


class _ItemCount(TorchDispatchMode):
    """Counts what reads one element, from Python or from C++."""

    n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


class _ListCount(TorchFunctionMode):
    """Counts what reads a whole tensor without an operator of its own on a CPU."""

    n = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += function in (Tensor.tolist, Tensor.numpy, Tensor.cpu)
        return function(*args, **kwargs or {})


def _before(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, act: Callable[..., None]) -> None:
    """Let `act` see the arguments of a method before it runs."""
    method = getattr(owner, name)

    def seen(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, seen)


@pytest.mark.parametrize(("strategy", "optimizer"), [("auto", "adamw"), ("ddp", "adamw"), ("auto", "lion")])
def test_a_step_is_read_by_the_host_once(
    strategy: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    with _ListCount() as lists, _ItemCount() as items:
        _before(monkeypatch, AfterStep, "on_train_batch_end", lambda *args: counts.append(lists.n + items.n))
        config = tiny_run_config(
            tmp_path,
            model={"n_layer": 1, "ctx_len": 8},
            data={"validation_fraction": 0.0},
            training={"max_steps": 3, "strategy": strategy, "optimizer": optimizer}
            | {"micro_bsz": 1, "global_batch_size": 2},
            checkpoint={"save_interval_steps": 100},
        )
        train(config)
    per_step = [after - before for before, after in zip(counts[1::2], counts[3::2], strict=False)]  # two micro batches
    assert per_step == [1, 1]


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("fault", "optimizer"), [("train.loss", "adamw"), ("train.gradient", "adamw"), ("train.gradient", "lion")]
)
def test_values_that_are_not_finite_are_not_applied(
    fault: str, optimizer: str, accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the update is in the queue before the host knows."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    before: list[dict[str, Tensor]] = []
    after: list[dict[str, Tensor]] = []

    def all_tensors(module: TrainingModule) -> dict[str, Tensor]:
        state = {
            f"{i} {key}": value for i, part in enumerate(module.optimizer.state.values()) for key, value in part.items()
        }
        return {name: tensor.clone() for name, tensor in {**module.model.state_dict(), **state}.items()}

    _before(monkeypatch, TrainingModule, "on_train_batch_start", lambda module, *_: before.append(all_tensors(module)))
    _before(monkeypatch, TrainingModule, "_require_finite", lambda module, *_: after.append(all_tensors(module)))
    monkeypatch.setenv(FAULT_VARIABLE, f"{fault}@2:hit")
    with pytest.raises(TrainingError, match=f"step 2: the {fault.removeprefix('train.')} is not finite on rank 0"):
        train(tiny_run_config(tmp_path, training={"optimizer": optimizer, "accelerator": accelerator}))
    assert len(after) == len(before) == 3
    assert len(after[-1]) > len(before[0])  # with the states that the first update makes
    assert after[-1].keys() == before[-1].keys()
    assert all(torch.equal(tensor, before[-1][name]) for name, tensor in after[-1].items())
