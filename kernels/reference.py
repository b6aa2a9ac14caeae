"""The WKV operators as plain time loops: the definition that every other backend is tested against.

Formulas follow RWKV-LM (RWKV-v5/src/model.py, RWKV-v7/train_temp/src/model.py and their CUDA kernels).
They are also the cheapest way to advance a state by one token, so generation uses them.

Legend: B batch, T time, H heads, N head size. float64 inputs are computed in float64, everything else in
float32, because a decay may be closer to 1 than lower precisions can say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_DECAY_SCALE = -math.exp(-0.5)
"""RWKV-7's decay is exp(LOG_DECAY_SCALE * sigmoid(w)), so it lies in (0.5452, 1)."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the operators calculate and keep the state for an input `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def initial_state(r: Tensor, state: Tensor | None) -> Tensor:
    """`state` in the computing dtype, or zeros [B,H,N,N] for `r` [B,T,H,N]."""
    if state is not None:
        return state.to(compute_dtype(r))
    batch, _, heads, size = r.shape
    return r.new_zeros(batch, heads, size, size, dtype=compute_dtype(r))


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5: `wkv6` with one decay per channel for all times.

    Args:
        r, k, v: [B,T,H,N].
        w: [H,N], raw: the decay is exp(-exp(w)).
        u: [H,N], the bonus of the current token.
        state: [B,H,N,N], indexed [key, value]; zeros when None.
        starts: bool [B,T], true where a document begins: the state before that step is zero. None begins when None.

    Returns:
        y [B,T,H,N] in r's dtype, and the final state [B,H,N,N] in float32 (float64 for float64 inputs).
    """
    return wkv6(r, k, v, w.expand_as(r), u, state, starts=starts)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6: y_t = S^T r_t + (r_t . (u k_t)) v_t, then S = diag(d_t) S + k_t v_t^T.

    The current token is read through u; the decay acts on the old state after the read.

    Args:
        r, k, v: [B,T,H,N].
        w: [B,T,H,N], raw: the decay is d = exp(-exp(w)).
        u: [H,N], the bonus of the current token.
        state: [B,H,N,N], indexed [key, value]; zeros when None.
        starts: bool [B,T], true where a document begins: the state before that step is zero. None begins when None.

    Returns:
        y [B,T,H,N] in r's dtype, and the final state [B,H,N,N] in float32 (float64 for float64 inputs).
    """
    s = initial_state(r, state)
    decay = torch.exp(-torch.exp(w.to(s.dtype)))
    bonus = u.to(s.dtype)
    outputs = []
    for t, (r_t, k_t, v_t, d_t) in enumerate(zip(*_steps(s.dtype, r, k, v, decay), strict=True)):  # [B,H,N] each
        s = _reset(s, starts, t)
        read = (r_t.unsqueeze(-2) @ s).squeeze(-2)  # [B,H,N]
        outputs.append(read + (r_t * bonus * k_t).sum(-1, keepdim=True) * v_t)
        s = d_t.unsqueeze(-1) * s + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # [B,H,N,N]
    return torch.stack(outputs, dim=1).to(r.dtype), s


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7: S = S diag(d_t) + (S a_t) b_t^T + v_t k_t^T, then y_t = S r_t.

    Args:
        r, k, v, a, b: [B,T,H,N].
        w: [B,T,H,N], the raw decay logit: d = exp(-e^{-1/2} sigmoid(w)).
        state: [B,H,N,N], indexed [value, key]; zeros when None.
        starts: bool [B,T], true where a document begins: the state before that step is zero. None begins when None.

    Returns:
        y [B,T,H,N] in r's dtype, and the final state [B,H,N,N] in float32 (float64 for float64 inputs).
    """
    s = initial_state(r, state)
    decay = torch.exp(LOG_DECAY_SCALE * torch.sigmoid(w.to(s.dtype)))
    outputs = []
    for t, (r_t, d_t, k_t, v_t, a_t, b_t) in enumerate(zip(*_steps(s.dtype, r, decay, k, v, a, b), strict=True)):
        s = _reset(s, starts, t)
        sa = s @ a_t.unsqueeze(-1)  # [B,H,N,1]
        s = s * d_t.unsqueeze(-2) + sa * b_t.unsqueeze(-2) + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        outputs.append((s @ r_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1).to(r.dtype), s


def _reset(s: Tensor, starts: Tensor | None, t: int) -> Tensor:
    """The state [B,H,N,N] before step t: zero in the rows where a document begins there."""
    return s if starts is None else s.masked_fill(starts[:, t, None, None, None], 0.0)


def _steps(dtype: torch.dtype, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each [B,T,H,N] tensor as T slices. unbind, not indexing, whose backward costs O(T) for every slice."""
    return [x.to(dtype).unbind(1) for x in tensors]
