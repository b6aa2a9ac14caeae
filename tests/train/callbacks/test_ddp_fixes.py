"""What is done about DDP's habits, and where gradients lie."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from pytorch_lightning import Callback, LightningModule, Trainer
from tiny_run import losses, tiny_run_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.train import fit
from rwkv_cluster.train.callbacks.ddp_fixes import StableBuckets
from rwkv_cluster.train.run import train


def test_the_pass_that_is_thrown_away_compiles_nothing_and_leaves_no_gradient(tmp_path: Path) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(graph)
        return graph

    class Model(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.square = torch.compile(lambda x: x * x, backend=backend)

        def forward(self, batch: TokenBatch) -> Tensor:
            return self.square(self.weight * (batch.inputs + 1)).sum()

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = Model()
        strategy = SimpleNamespace(model=DistributedDataParallel(module))
        trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1)
        StableBuckets().on_train_start(trainer, module)  # type: ignore[arg-type]
        assert compiled == []
        assert module.weight.grad is None
        module(TokenBatch.of(torch.zeros(2, 3, dtype=torch.int64)))
        assert len(compiled) == 1
    finally:
        torch.distributed.destroy_process_group()


class _Gradients(Callback):
    """Before each micro batch: the storages that gradients lie in, and whether one of them is other than 0."""

    def __init__(self, seen: list[tuple[int, bool]]) -> None:
        self._seen = seen

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: TokenBatch, batch_idx: int
    ) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        self._seen.append((len(storages), any(bool(gradient.any()) for gradient in gradients)))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"micro_bsz": 4}, [(0, False)] * 2),
        ({"micro_bsz": 4, "strategy": "ddp"}, [(0, False)] * 2),
        ({"micro_bsz": 2, "strategy": "ddp", "accumulate_grad_batches": 2}, [(1, False), (1, True)] * 2),
    ],
    ids=["alone", "DDP", "DDP with accumulation"],
)
def test_a_forward_pass_has_gradients_in_memory_once_and_only_where_they_add_up(
    training: dict[str, object],
    expected: list[tuple[int, bool]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model's parameters fit one bucket."""
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(fit, "AllReduceCheck", lambda: _Gradients(seen))
    train(tiny_run_config(tmp_path, training={"max_steps": 2, "val_max_tokens": 32, **training}))
    assert seen == expected
    assert len(losses(tmp_path / "work")) == 2
