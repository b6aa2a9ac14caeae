"""What is done about DDP's habits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.data.windows import TokenBatch
from rwkv_cluster.train.callbacks.ddp_fixes import StableBuckets


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
        trainer = SimpleNamespace(strategy=SimpleNamespace(model=DistributedDataParallel(module)))
        StableBuckets().on_train_start(trainer, module)  # type: ignore[arg-type]
        assert compiled == []
        assert module.weight.grad is None
        module(TokenBatch.of(torch.zeros(2, 3, dtype=torch.int64)))
        assert len(compiled) == 1
    finally:
        torch.distributed.destroy_process_group()
