"""RWKV-5's and RWKV-6's operators in chunked matrix form, with a hand-written backward.

Inside a chunk the weight of the value written at s in the output read at t is

    P_ts = sum over channels of r_t k_s d_{s+1} ... d_{t-1}   (s < t),    P_tt = r_t . (u k_t)

The decay d may be anything in [0, 1], so 1/c (see `chunked_wkv7`) is not available. A product of decays is
split instead at a point between s and t, and each side takes its own factor exp(sum of log d) <= 1, which can
only underflow where the product does. Positions of a chunk are halved recursively: rows of a right half
meet rows of the left half beside it at their common boundary, down to leaves of 8 rows.

In a leaf both sides are taken relative to the leaf's middle, where exponents are positive for some rows. There
log d is bounded from below so that they stay finite. The bound (d < 3e-8 in float32) is under the rounding
error of the terms it is added to.

Y = P V + (r c_{t-1}) S_0 and S_L = diag(c_L) S_0 + (k c_L/c)^T V carry the state over the chunk.

Where documents begin inside a chunk, P has no entries between two of them, only the first one reads S_0, and only the
last one is written into S_L.

Forward keeps the state at segment boundaries and nothing else; backward recomputes a segment before it
differentiates it.

Legend: B batch, T time, H heads, N head size, L chunk length, n chunks in the segment. Outside, states are
[key, value]; in here they are [value, key], so that a decay is a row and the product with it runs along memory.
RWKV-5 is the same with one decay for all times and rows: w then has batch size 1, written W = B or 1 below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_cluster.kernels.chunked import layout
from rwkv_cluster.kernels.reference import initial_state
from rwkv_cluster.kernels.sizes import CHUNK

LEAF = 8
MIN_LOG_DECAY = -1e4
"""exp of it is 0 in every dtype, and sums of it stay finite."""


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
    """RWKV-5's operator with the arguments and results of `reference.wkv5`; differentiable once in every argument."""
    return wkv6(r, k, v, w.expand(1, r.shape[1], -1, -1), u, state, starts=starts)


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
    """RWKV-6's operator with the arguments and results of `reference.wkv6`; differentiable once in every argument."""
    return _Wkv6.apply(r, k, v, w, u, initial_state(r, state), starts)


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y = layout.empty_padded(r, CHUNK)
        s = _t(state)
        boundaries = []
        for segment in layout.segments(r, CHUNK):
            boundaries.append(s)
            part = _prepare(r, k, v, w, u, segment, starts)
            states = _advance(part, s)
            s = states[-1].clone()
            from_state = part.r_start @ _t(states[:-1])
            torch.add(part.weights @ part.v, from_state, out=layout.store(y, segment, CHUNK))
        ctx.save_for_backward(r, k, v, w, u, starts, *boundaries)
        return layout.trimmed(y, r.shape[1]), _t(s).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, w, u, starts, *boundaries = ctx.saved_tensors
        grads = [layout.empty_padded(x, CHUNK) for x in (r, k, v, w)]
        du = torch.zeros(u.shape, dtype=dstate.dtype, device=u.device)
        g = _t(dstate)
        for segment, s in reversed(list(zip(layout.segments(r, CHUNK), boundaries, strict=True))):
            part = _prepare(r, k, v, w, u, segment, starts)
            states = _advance(part, s)
            targets = [layout.store(x, segment, CHUNK) for x in grads]
            g = _differentiate(part, states, layout.load(dy, segment, CHUNK), g, targets, du)
        return *(layout.trimmed(x, dy.shape[1]) for x in grads), du.to(u.dtype), _t(g), None


@dataclass
class _Segment:
    """Tensors of a segment, [n,B,H,L,N] unless said otherwise."""

    r: Tensor
    k: Tensor
    v: Tensor
    u: Tensor  # [H,1,N]
    log_decay: Tensor  # [n,W,H,L,N]
    scales: list[Tensor]  # [n,W,H,L,N] each: from the start, to the end, then one for each halving; W = B of documents
    leaf_scales: list[Tensor]  # [n,W,H,L,N] each: of r and of k, about the middle of the leaf
    total: Tensor  # [n,W,H,1,N] c_L, or 0 where a document begins in the chunk
    r_start: Tensor  # r c_{t-1}, or 0 behind the first begin
    k_end: Tensor  # k c_L / c_t, or 0 before the last begin
    r_leaf: Tensor  # [n,B,H,L/8,8,N]
    k_leaf: Tensor  # [n,B,H,L/8,8,N]
    halves: list[tuple[Tensor, Tensor]]  # r of right halves, k of left halves: [n,B,H,L/2m,m,N], m = 8, 16, ..
    weights: Tensor  # [n,B,H,L,L] P
    documents: layout.Documents | None


@lru_cache(maxsize=8)
def _tables(chunk: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums over log d as matrices on the rows of a chunk.

    The first, [(2 + halvings) L + 1, L], has the sum before t, after s, then for each halving from s to the
    boundary or from the boundary to t, and the whole sum. The second, [2L, L], has r's and k's leaf sums.
    """
    row, col = torch.arange(chunk)[:, None], torch.arange(chunk)[None, :]
    sums = [col < row, col > row]
    for half in _halvings(chunk):
        middle = row // (2 * half) * (2 * half) + half
        sums.append(torch.where(row < middle, (col > row) & (col < middle), (col >= middle) & (col < row)))
    sums.append(torch.ones(1, chunk, dtype=torch.bool))
    middle = row // LEAF * LEAF + LEAF // 2
    after_middle, before_middle = col >= middle, col < middle
    read = (after_middle & (col < row)).to(dtype) - (before_middle & (col >= row)).to(dtype)
    written = (before_middle & (col > row)).to(dtype) - (after_middle & (col <= row)).to(dtype)
    return torch.cat(sums).to(device, dtype), torch.cat([read, written]).to(device)


def _halvings(chunk: int) -> list[int]:
    """Rows of a half at each level: LEAF, 2 LEAF, .. chunk / 2."""
    return [LEAF << level for level in range((chunk // LEAF).bit_length() - 1)]


def _prepare(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, segment: slice, starts: Tensor | None) -> _Segment:
    r, k, v = (layout.load(x, segment, CHUNK).contiguous() for x in (r, k, v))
    w = layout.load(w, segment, CHUNK, -math.inf)
    log_decay = torch.exp(w, out=layout.empty_chunks(w, CHUNK)).neg_().clamp_(min=MIN_LOG_DECAY)
    table, leaf_table = _tables(CHUNK, r.dtype, r.device)
    summed = (table @ log_decay).exp_()
    scales = list(summed[..., :-1, :].unflatten(-2, (-1, CHUNK)).unbind(-3))
    total = summed[..., -1:, :]
    documents = layout.documents(starts, segment, CHUNK, r.dtype)
    if documents is not None:
        scales[:2] = scales[0] * documents.first, scales[1] * documents.last
        total = total * documents.through
    leaf_bound = -0.2 * math.log(torch.finfo(r.dtype).max)  # at most 4 terms: e^71 in float32
    leaf_summed = (leaf_table @ log_decay.clamp(min=leaf_bound)).exp_()
    r_scale, k_scale = leaf_scales = list(leaf_summed.unflatten(-2, (2, CHUNK)).unbind(-3))
    part = _Segment(
        r=r,
        k=k,
        v=v,
        u=u.to(r.dtype).unsqueeze(-2),
        log_decay=log_decay,
        scales=scales,
        leaf_scales=leaf_scales,
        total=total,
        r_start=r * scales[0],
        k_end=k * scales[1],
        r_leaf=(r * r_scale).unflatten(-2, (-1, LEAF)),
        k_leaf=(k * k_scale).unflatten(-2, (-1, LEAF)),
        halves=[
            (_half(r, m, 1) * _half(scale, m, 1), _half(k, m, 0) * _half(scale, m, 0))
            for m, scale in zip(_halvings(CHUNK), scales[2:], strict=True)
        ],
        weights=r.new_zeros(*r.shape[:-1], CHUNK),
        documents=documents,
    )
    _fill_weights(part)
    return part


def _fill_weights(p: _Segment) -> None:
    _leaves(p.weights).copy_((p.r_leaf @ _t(p.k_leaf)).tril_(-1))
    for m, (r_half, k_half) in zip(_halvings(CHUNK), p.halves, strict=True):
        _crossing(p.weights, m).copy_(r_half @ _t(k_half))
    _drop_others(p, p.weights)
    p.weights.diagonal(dim1=-2, dim2=-1).copy_((p.r * p.u).mul_(p.k).sum(-1))


def _drop_others(p: _Segment, weights: Tensor) -> None:
    """Zero the weights [n,B,H,L,L] between positions of different documents."""
    if p.documents is not None:
        weights.masked_fill_(p.documents.apart, 0.0)


def _advance(p: _Segment, state: Tensor) -> Tensor:
    """The states at the chunks' boundaries, [n+1,B,H,N,N], from the first one [B,H,N,N]."""
    states = state.new_empty(len(p.r) + 1, *state.shape)
    states[0] = state
    s, *after = states.unbind()
    for k_c, v_c, total_c, next_s in zip(p.k_end, p.v, p.total, after, strict=True):
        s = torch.mul(s, total_c, out=next_s)
        s.flatten(0, 1).baddbmm_(_t(v_c.flatten(0, 1)), k_c.flatten(0, 1))
    return states


def _retreat(p: _Segment, dy: Tensor, g: Tensor) -> Tensor:
    """The states' gradients [n+1,B,H,N,N] from the last one [B,H,N,N]."""
    grads = g.new_empty(len(p.r) + 1, *g.shape)
    grads[-1] = g
    *before, g = grads.unbind()
    for r_c, dy_c, total_c, next_g in reversed(list(zip(p.r_start, dy, p.total, before, strict=True))):
        g = torch.mul(g, total_c, out=next_g)
        g.flatten(0, 1).baddbmm_(_t(dy_c.flatten(0, 1)), r_c.flatten(0, 1))
    return grads


def _differentiate(p: _Segment, states: Tensor, dy: Tensor, g: Tensor, targets: list[Tensor], du: Tensor) -> Tensor:
    """Backward of a segment.

    states [n+1,B,H,N,N]; dy [n,B,H,L,N]; g [B,H,N,N] is the gradient of the segment's last state. Writes the
    gradients of r, k, v, w into `targets` [n,B,H,L,N], adds to du [H,N] and returns the gradient of the first
    state.
    """
    dy = dy.contiguous()
    grads = _retreat(p, dy, g)
    ends = grads[1:]
    dweights = dy @ _t(p.v)
    _drop_others(p, dweights)
    dv = (_t(p.weights) @ dy).add_(p.k_end @ _t(ends))
    dr = (dy @ states[:-1]).mul_(p.scales[0])
    dk = (p.v @ ends).mul_(p.scales[1])
    _add_leaf_gradients(p, dweights, dr, dk)
    _add_half_gradients(p, dweights, dr, dk)

    dr_out, dk_out, dv_out, dw_out = targets
    dlog = _log_decay_gradient(p, dr, dk, ends, states[1:])
    if len(p.log_decay[0]) == 1:
        dlog = dlog.sum(1, keepdim=True)
    torch.mul(dlog, p.log_decay, out=dw_out)  # d(log d)/dw = -exp(w) = log d
    ddiagonal = dweights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [n,B,H,L,1]
    torch.addcmul(dr, p.k * p.u, ddiagonal, out=dr_out)
    torch.addcmul(dk, p.r * p.u, ddiagonal, out=dk_out)
    du += (_t(p.r * p.k) @ ddiagonal).sum((0, 1)).squeeze(-1)
    dv_out.copy_(dv)
    return grads[0]


def _add_leaf_gradients(p: _Segment, dweights: Tensor, dr: Tensor, dk: Tensor) -> None:
    r_scale, k_scale = p.leaf_scales
    d = _leaves(dweights).tril(-1)
    dr.addcmul_((d @ p.k_leaf).flatten(-3, -2), r_scale)
    dk.addcmul_((_t(d) @ p.r_leaf).flatten(-3, -2), k_scale)


def _add_half_gradients(p: _Segment, dweights: Tensor, dr: Tensor, dk: Tensor) -> None:
    for m, scale, (r_half, k_half) in zip(_halvings(CHUNK), p.scales[2:], p.halves, strict=True):
        d = _crossing(dweights, m)
        _half(dr, m, 1).addcmul_(d @ k_half, _half(scale, m, 1))
        _half(dk, m, 0).addcmul_(_t(d) @ r_half, _half(scale, m, 0))


def _log_decay_gradient(p: _Segment, dr: Tensor, dk: Tensor, ends: Tensor, states: Tensor) -> Tensor:
    """d log d_t = sum over s > t of r dr, minus s >= t of k dk, plus <G, S> at the chunk's end (per key).

    dr and dk without the bonus. The sums cancel where the decay is nearly 0, and there the gradient is 0.
    """
    upper = torch.ones(CHUNK, CHUNK, dtype=dr.dtype, device=dr.device).triu()
    dlog = upper.triu(1) @ (p.r * dr)
    dlog -= upper @ (p.k * dk)
    at_end = [(g * s).sum(-2, keepdim=True) for g, s in zip(ends, states, strict=True)]  # [B,H,1,N]
    dlog += torch.stack(at_end)
    return dlog.masked_fill_(p.log_decay < math.log(torch.finfo(dr.dtype).eps), 0.0)


def _leaves(x: Tensor) -> Tensor:
    """The diagonal blocks of x [..,L,L] as a view [..,L/8,8,8]."""
    return _diagonal_blocks(x, LEAF)


def _crossing(x: Tensor, half: int) -> Tensor:
    """The blocks of x [..,L,L] where right halves read what left halves wrote, a view [..,L/2m,m,m]."""
    return _diagonal_blocks(x, 2 * half)[..., half:, :half]


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    blocks = x.unflatten(-2, (-1, size)).unflatten(-1, (-1, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _half(x: Tensor, half: int, side: int) -> Tensor:
    """Rows of the left (0) or right (1) halves of x [..,L,N], a view [..,L/2m,m,N]."""
    return x.unflatten(-2, (-1, 2, half)).select(-3, side)


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)
