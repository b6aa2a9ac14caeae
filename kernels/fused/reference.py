"""What a block computes beside its matrix products and WKV, in plain PyTorch: the definition of `fused`.

Legend: B batch, T time, H heads, N head size, C = H N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KAPPA_EPS = 1e-12
HEAD_NORM_EPS = 64e-5  # RWKV-LM: 1e-5 on y / 8, which is 64e-5 on y


def mix(x: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """See `fused.mix`."""
    return blend(x, F.pad(x, (0, 0, 1, -1)) - x, mixes)


def blend(x: Tensor, delta: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """See `fused.blend`."""
    return tuple(torch.addcmul(x, delta, m.to(x.dtype)) for m in mixes)


def squared_relu(x: Tensor) -> Tensor:
    """See `fused.squared_relu`."""
    result: Tensor = _SquaredRelu.apply(x)
    return result


def prepare_keys(k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `fused.prepare_keys`."""
    q = (k * k_k.to(k.dtype)).unflatten(-1, (-1, size))
    accurate = torch.promote_types(q.dtype, torch.float32)
    kappa = F.normalize(q.to(accurate), dim=-1, eps=KAPPA_EPS).to(k.dtype).flatten(-2)
    written = k * torch.addcmul(1 - k_a.to(k.dtype), a, k_a.to(k.dtype))
    return written, -kappa, kappa * a


def head_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """RWKV-LM's `ln_x`: group norm with one group per head, then weight and bias [C]; y [B,T,H,N] -> [B,T,C].

    Written as a layer norm over N: on a CPU that is 2.5 times as fast as group_norm, forward and backward.
    """
    normed = F.layer_norm(y, y.shape[-1:], eps=HEAD_NORM_EPS).flatten(-2)  # [B,T,C]
    return torch.addcmul(bias.to(y.dtype), normed, weight.to(y.dtype))


def gated_readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """See `fused.gated_readout`."""
    z = head_norm(y, weight, bias)
    accurate = torch.promote_types(r.dtype, torch.float32)
    bonus = (r * k * r_k.to(r.dtype)).sum(-1, keepdim=True, dtype=accurate)  # [B,T,H,1]
    return torch.addcmul(z.unflatten(-1, r_k.shape), bonus.to(z.dtype), v).flatten(-2) * gate


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `fused.gated_norm`."""
    return head_norm(y, weight, bias) * F.silu(gate)


class _SquaredRelu(torch.autograd.Function):
    """Saves relu(x) alone: the gradient is 2 relu(x), one tensor of the block's widest less than autograd keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)
