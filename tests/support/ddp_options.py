"""A process that trains a tiny model under DDP with one set of options after another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny_models import add_trained_adapter, some_tokens, tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.model.loss import target_loss
from rwkv_cluster.train.parallel.strategy import DDP_OPTIONS

STEPS, MICRO_BATCHES = 2, 2
PARTS = (("all", False), ("without ffn", True), ("lora", True))
"""What is trained, and grad_cp."""
OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "torch's own": ({}, False),
    "ours": (DDP_OPTIONS, False),
    "kept gradients": (DDP_OPTIONS, True),
    "static_graph": (DDP_OPTIONS | {"static_graph": True}, True),
    "small buckets": (DDP_OPTIONS | {"bucket_cap_mb": 0.05}, True),
}
"""Arguments of DDP, and whether gradients become 0 between two steps and not None."""


class _Loss(nn.Module):
    """The loss of a tiny model. part: what of it is trained."""

    def __init__(self, part: str, *, grad_cp: bool) -> None:
        super().__init__()
        self.model = tiny_model("x070")
        self.model.grad_cp = grad_cp
        if part == "lora":
            self.model.requires_grad_(False)
            add_trained_adapter(self.model, AdapterConfig(kind="lora", rank=4))
        elif part == "without ffn":
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "ffn" not in name)

    def forward(self, tokens: Tensor) -> Tensor:
        return target_loss(self.model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0.0)


def _train(module: nn.Module, options: dict[str, Any], keeps_gradients: bool) -> list[Tensor]:
    """Losses of each step and final parameters, after the pass that settles the buckets."""
    ddp = DistributedDataParallel(module, **options)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ddp(torch.zeros(1, 3, dtype=torch.int64)).backward()
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=not keeps_gradients)
        for number in range(MICRO_BATCHES):
            tokens = some_tokens(2, 9, seed=step + 10 * number + 100 * dist.get_rank())
            if number < MICRO_BATCHES - 1:
                with ddp.no_sync():
                    ddp(tokens).backward()
            else:
                loss = ddp(tokens)
                loss.backward()
                losses.append(loss.detach())
        optimizer.step()
    return [*losses, *(parameter.detach().clone() for parameter in parameters)]


def train_as_rank(rank: int, store: str, results: str) -> None:
    """Write what each case gives to results/<rank>.pth. store: a file in which two ranks meet."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {
        (part, grad_cp, name): _train(_Loss(part, grad_cp=grad_cp), *options)
        for part, grad_cp in PARTS
        for name, options in OPTIONS.items()
    }
    torch.save(found, f"{results}/{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()
