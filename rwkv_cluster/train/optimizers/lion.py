"""Lion over RWKV-LM's parameter groups (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv
2302.06675, algorithm 2).

    u = sign(beta1 m + (1 - beta1) g),  w = w - lr (u + weight_decay w),  m = beta2 m + (1 - beta2) g

Every element moves by lr: the paper's rates are three to ten times smaller than AdamW's, and its weight decay as much
larger.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.train.optimizers.adamw import group_of
from rwkv_cluster.train.optimizers.closure import loss_of
from rwkv_cluster.train.optimizers.table import MOMENTUM

__all__ = ["Lion", "build", "group_of"]


def build(groups: list[dict[str, Any]], training: TrainingConfig) -> Lion:
    """Lion over `groups`."""
    return Lion(groups, lr=training.lr_init, betas=(training.beta1, training.beta2))


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay. Its formula is one of elements, so that ZeRO may cut parameters anywhere."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state |= {MOMENTUM: torch.zeros_like(parameter), "step": torch.tensor(0.0)}
        state["step"] += 1
        direction = state[MOMENTUM].lerp(gradient, 1 - beta1).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])
        state[MOMENTUM].lerp_(gradient, 1 - beta2)
