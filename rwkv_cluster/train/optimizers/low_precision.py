"""Copies of the blocks' matrices in the precision of activations, written once a step in place of each forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rwkv_cluster.model.layers import Linear, LowPrecisionCopy


def keep_copies(blocks: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep a copy of each matrix of `blocks`, and write all of them anew after every update of `optimizer`.

    An update that the device leaves out writes the same values again. Whatever else changes a matrix is noticed in the
    next forward pass.
    """
    layers = [module for module in blocks.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.kept = LowPrecisionCopy()

    @torch.no_grad()
    def refresh(*arguments: Any) -> None:
        pairs = [(layer.kept, layer.weight) for layer in layers]
        made = [(kept, kept.values, weight) for kept, weight in pairs if kept is not None and kept.values is not None]
        if made:
            torch._foreach_copy_([values for _, values, _ in made], [weight for _, _, weight in made])
        for kept, _, weight in made:
            kept.refreshed(weight)

    optimizer.register_step_post_hook(refresh)
