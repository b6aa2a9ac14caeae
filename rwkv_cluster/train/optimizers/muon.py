"""Muon for the matrices of the blocks, AdamW over RWKV-LM's groups for everything else.

    m = mu m + (1 - mu) g,  u = mu m + (1 - mu) g,  w = w - lr (0.2 sqrt(max(rows, columns)) NS(u) + weight_decay w)

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, kellerjordan.github.io/posts/muon: the
momentum of Nesterov and NS, five steps of a Newton-Schulz iteration, which brings all singular values near 1.
Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982, section 2.2: the scale, which gives an update
the root mean square of AdamW's, so that both take one learning rate and one weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.train.optimizers import adamw
from rwkv_cluster.train.optimizers.adamw import group_of
from rwkv_cluster.train.optimizers.closure import loss_of
from rwkv_cluster.train.optimizers.table import MOMENTUM

__all__ = ["Muon", "build", "group_of", "orthogonalized"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: singular values come to lie between 0.68 and 1.13
STEPS = 5
RMS_OF_ADAMW = 0.2  # Liu et al.
_SMALLEST_NORM = 1e-7


def build(groups: list[dict[str, Any]], training: TrainingConfig) -> Muon:
    """Muon over the groups whose moments are a matrix's, AdamW over the others."""
    return Muon(groups, training)


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [n,m] with its singular vectors and singular values near 1: U V^T, its polar factor, approximately.

    dtype: of the products.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if is_tall else x  # the smaller side first: products [n,n] of the smaller n
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


OfWholeMatrices = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(parameter, values of its shape, function of a matrix) -> the function's value, in the parameter's shape."""


def _of_parameter(parameter: Tensor, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(values)


class Muon(torch.optim.Optimizer):
    """Muon beside an AdamW that shares its groups and state.

    of_whole_matrices: replaced where parameters are pieces of matrices, as under ZeRO, see
    `parallel.zero.ZeroShardedState`.
    """

    def __init__(self, groups: list[dict[str, Any]], training: TrainingConfig) -> None:
        super().__init__(groups, {"lr": training.lr_init, "fused": training.precision != "fp16"})
        self.of_whole_matrices: OfWholeMatrices = _of_parameter
        self._adamw = adamw.build(groups, training)
        self._momentum = training.muon_momentum
        self._in_bf16 = training.precision == "bf16"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        groups = self.param_groups  # DeepSpeed exchanges them and their parameters
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in groups if MOMENTUM not in group["moments"]]
        self._adamw.step()
        for group in groups:
            if MOMENTUM in group["moments"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {MOMENTUM: torch.zeros_like(parameter), "step": torch.tensor(0.0)}
        state["step"] += 1
        momentum = state[MOMENTUM].lerp_(gradient, 1 - self._momentum)
        update = self.of_whole_matrices(parameter, gradient.lerp(momentum, self._momentum), self._scaled)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr)

    def _scaled(self, matrix: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self._in_bf16 and matrix.is_cuda else torch.float32
        return orthogonalized(matrix, dtype).to(matrix.dtype) * (RMS_OF_ADAMW * math.sqrt(max(matrix.shape)))
