"""Copies of matrices in the precision of activations, written once a step in place of each forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.model.layers import Linear, LowPrecisionCopy, OwnMatrices
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import version_of


def keep_copies(model: RWKV, optimizer: torch.optim.Optimizer) -> None:
    """Keep a copy of each matrix of blocks and head, and write all of them anew after every update of `optimizer`.

    An update that the device leaves out writes the same values again. Whatever else changes a matrix is noticed in the
    next forward pass.
    """
    pairs = _begin(model)

    @torch.no_grad()
    def refresh(*arguments: Any) -> None:
        made = [(kept, kept.values, weight) for kept, weight in pairs if kept.values is not None]
        if made:
            torch._foreach_copy_([values for _, values, _ in made], [weight for _, _, weight in made])
        for kept, _, weight in made:
            kept.refreshed(weight)

    optimizer.register_step_post_hook(refresh)


def _begin(model: RWKV) -> list[tuple[LowPrecisionCopy, Tensor]]:
    """Copies, still without values, of every matrix, and that."""
    of_loras = [name for pair in version_of(model.config).loras for name in pair]
    pairs: list[tuple[LowPrecisionCopy, Tensor]] = []
    for module in model.modules():
        if isinstance(module, Linear):
            module.kept = LowPrecisionCopy()
            pairs.append((module.kept, module.weight))
        elif isinstance(module, OwnMatrices):
            own = dict(module.named_parameters(recurse=False))
            module.kept = {name: LowPrecisionCopy() for name in of_loras if name in own}
            pairs += [(copy, own[name]) for name, copy in module.kept.items()]
    return pairs
