"""Building blocks that the three versions share: dense products, norms and the token shift.

Parameters may be fp32 masters while activations are bf16 or fp16: every layer uses its weights in the dtype
of its input (`weight.to(x.dtype)`, free when equal), which equals training on a low-precision copy that is
refreshed from the masters after each step. Statistics of the norms are computed in fp32.

Shapes: B batch, T time, C width, A attention width, H heads, N head size (A = H * N), M = B * T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_cluster.kernels import fused

LAYER_NORM_EPS = 1e-5


def uninitialized(*shape: int) -> nn.Parameter:
    """Parameter full of NaN, so that a model used before `initialize` or a load fails loudly."""
    return nn.Parameter(torch.full(shape, float("nan")))


@cache
def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """fp32 x Wᵀ + b on a CPU through oneDNN.

    PyTorch sends fp32 products to MKL, which on AMD processors does without AVX-512: 95 against 190 GFLOP/s
    measured on one Zen 5 core. bf16 products go to oneDNN already.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # oneDNN takes any strides, but for most it has only a reference loop: 100 times slower
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # [..., in], [out, in]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.contiguous().view(-1, grad.shape[-1])  # [M, out]
        grad_x = _onednn(rows, weight.t()).view(x.shape) if needs_x else None
        grad_weight = _onednn(rows.t(), x.view(-1, x.shape[-1]).t()) if needs_weight else None  # [out, in]
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    many_rows = x.numel() >= 16 * x.shape[-1]  # for a few rows oneDNN's set-up costs more than it saves
    if x.dtype == torch.float32 and x.device.type == "cpu" and many_rows and _has_onednn_linear():
        return _OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """y = x Wᵀ without bias; weight [out, in]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = uninitialized(n_out, n_in)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of weight [V, C] by token id."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = uninitialized(vocab_size, width)

    def forward(self, tokens: Tensor) -> Tensor:  # int [B, T] -> [B, T, C] in the weight's dtype
        return F.embedding(tokens, self.weight)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, with weight and bias [C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = uninitialized(width)
        self.bias = uninitialized(width)

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), LAYER_NORM_EPS)


class HeadNorm(nn.Module):
    """RWKV-LM's `ln_x`: group norm with one group per head, then weight and bias [A].

    Written as a layer norm over N: on a CPU that is 2.5 times as fast as group_norm, forward and backward.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = uninitialized(width)
        self.bias = uninitialized(width)

    def forward(self, y: Tensor) -> Tensor:  # [B, T, H, N] -> [B, T, A]
        normed = F.layer_norm(y, y.shape[-1:], eps=fused.HEAD_NORM_EPS).flatten(-2)  # [B,T,A]
        return torch.addcmul(self.bias.to(y.dtype), normed, self.weight.to(y.dtype))


class _SquaredRelu(torch.autograd.Function):
    """relu(x)², saving relu(x) alone: its gradient is 2 relu(x), a pass over the widest tensor of a block."""

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


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)², the activation of every channel mix."""
    return _SquaredRelu.apply(x)


def previous_tokens(x: Tensor, before: Tensor | None) -> Tensor:
    """Token shift: x [B, T, C] one step later, with `before` [B, C] (zeros by default) as the first step."""
    if before is None:
        return F.pad(x, (0, 0, 1, -1))
    return torch.cat([before.to(x.dtype).unsqueeze(1), x[:, :-1]], dim=1)


def mixed(x: Tensor, before: Tensor | None, mixes: Sequence[Tensor], choice: str) -> list[Tensor]:
    """x + Δ ⊙ mix for each [1, 1, C] of `mixes`; x [B, T, C]. choice: compiled or plain, see `kernels.fused`."""
    if before is None:
        return list(fused.mix(x, mixes, fused.MULTIPLE, choice=choice))
    delta = shift_delta(x, before)
    return [torch.addcmul(x, delta, mix.to(x.dtype)) for mix in mixes]


def shift_delta(x: Tensor, before: Tensor | None) -> Tensor:
    """Δ = σ(x) - x [B, T, C], what the token mixes of x060 and x070 interpolate along."""
    return previous_tokens(x, before) - x
