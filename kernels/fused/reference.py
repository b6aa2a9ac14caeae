"""What a block computes beside its matrix products and WKV, in plain PyTorch: the definition of `fused.ops`.

Legend: B batch, T time, H heads, N head size, C = H N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KAPPA_EPS = 1e-12
LAYER_NORM_EPS = 1e-5
HEAD_NORM_EPS = 64e-5  # RWKV-LM: 1e-5 on y / 8, which is 64e-5 on y


def mix(x: Tensor, mixes: Sequence[Tensor], starts: Tensor | None = None) -> tuple[Tensor, ...]:
    """Token shift: x [B,T,C] + (x one step earlier - x) * m for each m of `mixes`, parameters of C elements.

    starts: bool [B,T], true where a document begins: zeros come before that step.
    """
    return blend(x, without_others(F.pad(x, (0, 0, 1, -1)), starts) - x, mixes)


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor | None],
    starts: Tensor | None = None,
    shift: Callable[..., tuple[Tensor, ...]] = mix,
) -> tuple[Tensor, ...]:
    """x + branch, and for each m of `mixes` the token shift of its layer norm h, or h itself where m is None.

    x, branch: [B,T,C], None for no branch; weight, bias and each m: C elements; starts as for mix; shift: a form of it.
    """
    if branch is not None:
        x = x + branch
    h = layer_norm(x, weight, bias)
    shifted = [m for m in mixes if m is not None]
    mixed = iter(shift(h, shifted, starts) if shifted else ())
    return x, *(h if m is None else next(mixed) for m in mixes)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the last dimension of x [..,C], with weight and bias [C] in x's dtype."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), LAYER_NORM_EPS)


def without_others(shifted: Tensor, starts: Tensor | None) -> Tensor:
    """Inputs of one step earlier [B,T,C], zeros where a document begins: `starts`, bool [B,T], or None for nowhere."""
    return shifted if starts is None else shifted.masked_fill(starts.unsqueeze(-1), 0.0)


def blend(x: Tensor, delta: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x + delta * m for each m of `mixes`; all [B,T,C]."""
    return tuple(torch.addcmul(x, delta, m.to(x.dtype)) for m in mixes)


def shift_blend(
    x: Tensor, mixes: Sequence[Tensor], constants: Sequence[Tensor], starts: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Token shift of RWKV-6: x [B,T,C] + (x one step earlier - x) * (m + c) for each m, c of `mixes` and `constants`.

    mixes: [B,T,C]; constants: parameters of C elements. starts: bool [B,T], true where a document begins.
    """
    delta = without_others(F.pad(x, (0, 0, 1, -1)), starts) - x
    return blend(x, delta, [m + c.flatten().to(m.dtype) for m, c in zip(mixes, constants, strict=True)])


def sigmoid_gate(gate: Tensor, value: Tensor) -> Tensor:
    """sigmoid(gate) * value, the output of the channel mix of RWKV-5 and 6; all [B,T,C]."""
    return torch.sigmoid(gate) * value


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2; x [B,T,C]."""
    result: Tensor = _SquaredRelu.apply(x)
    return result


class Prepared(NamedTuple):
    """What RWKV-7 computes before WKV from its products. [B,T,C] but for bonus [B,T,H], which is fp32 or float64.

    r and v_first are as they came, for later uses, and v_again is v once more: so the compiled libraries' pass receives
    all their gradients and adds them. k, removed and replaced are WKV's k, a and b.
    """

    r: Tensor
    k: Tensor
    removed: Tensor
    replaced: Tensor
    v: Tensor
    v_again: Tensor
    v_first: Tensor
    bonus: Tensor


def prepare(
    r: Tensor,
    k: Tensor,
    a: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    v_mix: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    a0: Tensor,
    v0: Tensor | None,
) -> Prepared:
    """RWKV-7's keys, values and bonus r . (k r_k), from a and v_mix before their sigmoids and without their biases.

    r, k, a, v, v_first, v_mix: [B,T,C], None, None in block 0. k_k, k_a, a0, v0: C elements; r_k [H,N].
    """
    if v_first is None or v_mix is None or v0 is None:
        v_first = v
    else:
        v = torch.lerp(v, v_first, (v_mix + v0.to(v_mix.dtype)).sigmoid_())
    rate = (a + a0.to(a.dtype)).sigmoid_()
    written, removed, replaced = prepare_keys(k, rate, k_k, k_a, r_k.shape[-1])
    accurate = torch.promote_types(r.dtype, torch.float32)
    bonus = ((r * written).unflatten(-1, r_k.shape) * r_k.to(r.dtype)).sum(-1, dtype=accurate)
    return Prepared(r, written, removed, replaced, v, v, v_first, bonus)


def prepare_keys(k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """k (1 + (a - 1) k_a), -kappa, kappa a, with kappa the per-head unit vector along k k_k.

    k, a: [B,T,C]; k_k, k_a: C elements; size: N. All results [B,T,C].
    """
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


def gated_readout(y: Tensor, v: Tensor, bonus: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(head norm of y, with weight and bias, + bonus v) * gate: RWKV-7's reading of WKV's output.

    y [B,T,H,N]; v, gate [B,T,C]; bonus [B,T,H]; weight, bias [C]. Returns [B,T,C].
    """
    heads = y.shape[-2:]
    z = head_norm(y, weight, bias).unflatten(-1, heads)
    return torch.addcmul(z, bonus.unsqueeze(-1).to(z.dtype), v.unflatten(-1, heads)).flatten(-2) * gate


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Head norm of y [B,T,H,N], with weight and bias [C], times silu(gate) [B,T,C]: the reading of RWKV-5 and 6."""
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
