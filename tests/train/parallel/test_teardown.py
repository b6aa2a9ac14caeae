"""What a session leaves behind when it ends: weights where they are, and nothing of gradients and moments."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from tiny_run import fingerprint, tiny_run_config

from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import load_pth
from rwkv_cluster.train import fit
from rwkv_cluster.train.parallel.teardown import free_memory
from rwkv_cluster.train.run import train
from rwkv_cluster.train.session import Session


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Those of the sessions that follow, which may not move anything to the CPU."""
    built: list[Trainer] = []

    def build(*arguments: Any) -> Trainer:
        built.append(build_trainer(*arguments))
        return built[-1]

    def refuse(module: LightningModule) -> None:
        pytest.fail("the model is moved")

    build_trainer = fit.build_trainer
    monkeypatch.setattr(fit, "build_trainer", build)
    monkeypatch.setattr(LightningModule, "cpu", refuse)
    return built


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"strategy": "ddp", "micro_bsz": 2, "accumulate_grad_batches": 2},
        {"optimizer": "muon", "ema_decay": 0.9},
        pytest.param({"zero_stage": 0}, marks=pytest.mark.system),
        pytest.param({"zero_stage": 2}, marks=pytest.mark.system),
        pytest.param({"zero_stage": 3}, marks=pytest.mark.system),
    ],
)
def test_weights_stay_and_the_rest_is_dropped(
    training: dict[str, Any], trainers: list[Trainer], tmp_path: Path
) -> None:
    if "zero_stage" in training:
        pytest.importorskip("deepspeed")
    result = train(tiny_run_config(tmp_path, training={"max_steps": 2, **training}))
    (trainer,) = trainers
    module = trainer.lightning_module
    assert trainer.strategy.model is module
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    assert all(parameter.grad is None for parameter in module.parameters())
    if training.get("zero_stage") != 3:  # which has them in pieces
        for name, tensor in load_pth(result.final_path).items():
            assert torch.equal(module.model.get_parameter(name), tensor), name


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_is_out_of_memory_when_its_session_is_over(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its last sample, whose model comes in the place of the one that was trained."""
    models: weakref.WeakSet[RWKV] = weakref.WeakSet()
    left: list[int] = []

    def build(session: Session) -> RWKV:
        model = build_model(session)
        models.add(model)
        return model

    def look(*arguments: Any) -> str:
        left.append(len(models))
        return "a sample"

    build_model = fit.build_model
    monkeypatch.setattr(fit, "build_model", build)
    monkeypatch.setattr(fit, "sample_text", look)
    training = {"max_steps": 1, "strategy": strategy}
    assert train(tiny_run_config(tmp_path, training=training, logging={"sample_tokens": 1})).sample == "a sample"
    assert left == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_gpu_is_as_before(strategy: str, trainers: list[Trainer], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    before = torch.cuda.memory_allocated()
    training = {"accelerator": "cuda", "precision": "bf16", "strategy": strategy}
    config = tiny_run_config(tmp_path, model={"n_embd": 128, "head_size_a": 64}, training=training)
    train(config)
    assert all(parameter.is_cuda for parameter in trainers[0].lightning_module.parameters())
    trainers.clear()
    free_memory()
    assert torch.cuda.memory_allocated() - before < 2**20
    assert fingerprint(config.work_dir)
