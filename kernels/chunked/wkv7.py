"""RWKV-7's operator in chunked matrix form, with a hand-written backward.

Inside a chunk let c_t be the product of the decays d_1..d_t, per key channel. With the left factors
a_t c_{t-1} and r_t c_t, and the right factors b_s / c_s and k_s / c_s, every entry of left @ right^T is an
inner product with exactly the decay that lies between its two times. With u_t = S_{t-1} a_t,
"ab" the part of the masked left @ right^T where a meets b (and so on), and S_0 the state at the chunk's start:

    (1 - ab) U = ak V + (a c_{t-1}) S_0^T                       unit lower triangular: solved by substitution
    Y          = rb U + rk V + (r c_t) S_0^T
    S_L        = (S_0 + U^T (b/c) + V^T (k/c)) diag(c_L)

Where documents begin inside a chunk, left @ right^T has no entries between two of them, only the first one reads S_0,
and only the last one is written into S_L.

The inverse of (1 - ab) is never built by doubling (Neumann series), which is unstable for correlated keys.
RWKV-7's decay is above 0.545, so 1/c stays below 2e4 in a chunk of 16: harmless in float32.

Forward keeps the state at segment boundaries and nothing else; backward recomputes a segment before it
differentiates it, which costs about a quarter more arithmetic and saves what autograd would hold.

Legend: B batch, T time, H heads, N head size, L chunk length, n chunks in the segment. State [value, key].
Stacked rows: left is [a; r], right is [b; k], uv is [U; V], all [n,BH,2L,N] with BH = B*H.
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
from rwkv_cluster.kernels.reference import LOG_DECAY_SCALE, initial_state
from rwkv_cluster.kernels.sizes import CHUNK


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
    """RWKV-7's operator with the arguments and results of `reference.wkv7`; differentiable once in every argument."""
    return _Wkv7.apply(r, w, k, v, a, b, initial_state(r, state), starts)


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = layout.empty_padded(r, CHUNK)
        s = state.flatten(0, 1)  # [BH,N,N]
        boundaries = []
        for segment in layout.segments(r, CHUNK):
            boundaries.append(s)
            part = _prepare(r, w, k, v, a, b, segment, starts)
            s = _advance(part, s)[-1].clone()
            _read(part, layout.store(y, segment, CHUNK))
        ctx.save_for_backward(r, w, k, v, a, b, starts, *boundaries)
        return layout.trimmed(y, r.shape[1]), s.view(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, a, b, starts, *boundaries = ctx.saved_tensors
        grads = [layout.empty_padded(x, CHUNK) for x in (r, w, k, v, a, b)]
        g = dstate.flatten(0, 1)  # [BH,N,N]
        for segment, s in reversed(list(zip(layout.segments(dy, CHUNK), boundaries, strict=True))):
            part = _prepare(r, w, k, v, a, b, segment, starts)
            _advance(part, s)
            targets = [layout.store(x, segment, CHUNK) for x in grads]
            g = _differentiate(part, layout.load(dy, segment, CHUNK), g, targets)
        return *(layout.trimmed(x, dy.shape[1]) for x in grads), g.view(dstate.shape), None


@dataclass
class _Segment:
    """One segment's factors, and after `_advance` its U and states."""

    rate: Tensor  # [n,BH,L,N]   sigmoid(w); log d = LOG_DECAY_SCALE * rate
    scale: Tensor  # [n,BH,2L,N] c_{t-1}, then c_t
    inverse_c: Tensor  # [n,BH,L,N]
    left: Tensor  # [n,BH,2L,N]
    right: Tensor  # [n,BH,2L,N]
    reads: Tensor | None  # [n,BH,2L,1] 1 for what reads the state at the start, 0 behind the first begin of a document
    left_start: Tensor  # [n,BH,2L,N] left * reads
    to_end: Tensor  # [n,BH,1 or 2L,N] c_L, or 0 before the last begin
    right_end: Tensor  # [n,BH,2L,N] right * to_end: decayed to the chunk's end
    total: Tensor  # [n,BH,1,N]  c_L, or 0 where a document begins in the chunk
    mask: Tensor  # [2L,2L] causal, or [n,BH,2L,2L] within documents: 1 or 0
    products: Tensor  # [n,BH,2L,2L] masked left @ right^T
    solver: Tensor  # [n,BH,L,L]  (1 - ab)^-1
    uv: Tensor  # [n,BH,2L,N]
    states: Tensor  # [n+1,BH,N,N]


@lru_cache(maxsize=8)
def _tables(chunk: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """log c_{t-1} and log c_t as a matrix [2L,L] on the rates, and the causal mask [2L,2L]."""
    inclusive = torch.ones(chunk, chunk, dtype=dtype, device=device).tril()
    sums = torch.cat([inclusive.tril(-1), inclusive])
    return sums * LOG_DECAY_SCALE, torch.cat([sums, sums], dim=1)


def _prepare(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, segment: slice, starts: Tensor | None
) -> _Segment:
    r, k, v, a, b = (layout.load(x, segment, CHUNK) for x in (r, k, v, a, b))
    rate = torch.sigmoid(layout.load(w, segment, CHUNK, -math.inf), out=layout.empty_chunks(r, CHUNK))
    sums, mask = _tables(CHUNK, rate.dtype, rate.device)
    scale = (sums @ rate).exp_()  # [n,B,H,2L,N]
    inverse_c = scale[..., CHUNK:, :].reciprocal()
    total = scale[..., -1:, :]
    left, right, uv = (layout.empty_chunks(r, 2 * CHUNK) for _ in range(3))
    torch.mul(a, scale[..., :CHUNK, :], out=left[..., :CHUNK, :])
    torch.mul(r, scale[..., CHUNK:, :], out=left[..., CHUNK:, :])
    torch.mul(b, inverse_c, out=right[..., :CHUNK, :])
    torch.mul(k, inverse_c, out=right[..., CHUNK:, :])
    uv[..., CHUNK:, :] = v
    rate, scale, inverse_c, total, left, right, uv = (
        x.flatten(1, 2) for x in (rate, scale, inverse_c, total, left, right, uv)
    )
    reads, left_start, to_end = None, left, total
    documents = layout.documents(starts, segment, CHUNK, rate.dtype)
    if documents is not None:
        mask = mask * ~_for_heads(documents.apart, r, 2, 2)
        reads = _for_heads(documents.first, r, 2)
        left_start = left * reads
        to_end = total * _for_heads(documents.last, r, 2)
        total = total * _for_heads(documents.through, r)
    products = (left @ _t(right)).mul_(mask)
    ab = products[..., :CHUNK, :CHUNK]
    identity = torch.eye(CHUNK, dtype=ab.dtype, device=ab.device).expand_as(ab)
    solver = torch.linalg.solve_triangular(-ab, identity, upper=False, unitriangular=True)
    n, heads, _, size = uv.shape
    states = uv.new_empty(n + 1, heads, size, size)
    return _Segment(
        rate=rate,
        scale=scale,
        inverse_c=inverse_c,
        left=left,
        right=right,
        reads=reads,
        left_start=left_start,
        to_end=to_end,
        right_end=right * to_end,
        total=total,
        mask=mask,
        products=products,
        solver=solver,
        uv=uv,
        states=states,
    )


def _for_heads(x: Tensor, like: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """x [n,B,1,i,j] for each head of `like` [n,B,H,L,N], `rows` by `columns` copies: [n,BH,rows i,columns j]."""
    return x.repeat(1, 1, like.shape[2], rows, columns).flatten(1, 2)


def _advance(p: _Segment, state: Tensor) -> Tensor:
    """Fill U and the states of the segment from the state [BH,N,N] at its start; returns the states."""
    u = p.solver @ (p.products[..., :CHUNK, CHUNK:] @ p.uv[..., CHUNK:, :])  # the part of U without S_0
    from_state = p.solver @ p.left_start[..., :CHUNK, :]  # U += from_state @ S_0^T
    p.states[0] = state
    s, *after = p.states.unbind()
    walk = zip(u, from_state, p.uv, p.right_end, p.total, after, strict=True)
    for u_c, from_state_c, uv_c, right_c, total_c, next_s in walk:
        uv_c[:, :CHUNK] = u_c.baddbmm_(from_state_c, _t(s))
        s = torch.mul(s, total_c, out=next_s).baddbmm_(_t(uv_c), right_c)
    return p.states


def _read(p: _Segment, y: Tensor) -> None:
    """Write y [n,B,H,L,N]."""
    from_chunk = p.products[..., CHUNK:, :] @ p.uv
    from_state = p.left_start[..., CHUNK:, :] @ _t(p.states[:-1])
    torch.add(from_chunk.view(y.shape), from_state.view(y.shape), out=y)


def _differentiate(p: _Segment, dy: Tensor, g: Tensor, targets: list[Tensor]) -> Tensor:
    """Backward of a segment.

    dy [n,B,H,L,N]; g [BH,N,N] is the gradient of the segment's last state. Writes the gradients of
    r, w, k, v, a, b into `targets` [n,B,H,L,N] and returns the gradient of the segment's first state.
    """
    sums, _ = _tables(CHUNK, g.dtype, g.device)
    zdy = torch.empty_like(p.uv)  # [Z; dY], Z the gradient of the right-hand side that U solves
    zdy[..., CHUNK:, :] = dy.flatten(1, 2)
    ends, g = _retreat(p, zdy, g)
    dproducts = (zdy @ _t(p.uv)).mul_(p.mask)
    from_state = zdy @ p.states[:-1]
    if p.reads is not None:
        from_state *= p.reads
    dleft = (dproducts @ p.right).add_(from_state)
    dright = (_t(dproducts) @ p.left).addcmul_(p.uv @ ends, p.to_end)
    dv = (_t(p.products[..., CHUNK:]) @ zdy).add_(p.right_end[..., CHUNK:, :] @ _t(ends))

    # d log c: each factor times its gradient; the decay of the whole chunk acts on the state at its end.
    dlog = dleft * p.left
    for half in (slice(0, CHUNK), slice(CHUNK, None)):
        dlog[..., CHUNK:, :].addcmul_(p.right[..., half, :], dright[..., half, :], value=-1)
    drate = _t(sums) @ dlog
    at_end = torch.stack([(x * s).sum(-2, keepdim=True) for x, s in zip(ends, p.states[1:], strict=True)])
    drate.add_(at_end, alpha=LOG_DECAY_SCALE).mul_(p.rate)

    dr, dw, dk, dv_out, da, db = targets
    rows = dy.shape[1:3]  # BH back to B, H
    torch.mul(_rows(dleft, 0, rows), _rows(p.scale, 0, rows), out=da)
    torch.mul(_rows(dleft, 1, rows), _rows(p.scale, 1, rows), out=dr)
    torch.mul(_rows(dright, 0, rows), p.inverse_c.unflatten(1, rows), out=db)
    torch.mul(_rows(dright, 1, rows), p.inverse_c.unflatten(1, rows), out=dk)
    torch.mul(drate.unflatten(1, rows), (1 - p.rate).unflatten(1, rows), out=dw)
    dv_out.copy_(dv.unflatten(1, rows))
    return g


def _rows(x: Tensor, half: int, batch_heads: torch.Size) -> Tensor:
    """The upper (0) or lower (1) half of stacked rows x [n,BH,2L,N], as a view [n,B,H,L,N]."""
    return x[..., half * CHUNK : (half + 1) * CHUNK, :].unflatten(1, batch_heads)


def _retreat(p: _Segment, zdy: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Walk the state's gradient backwards, filling Z.

    Returns the gradient of the state at each chunk's end [n,BH,N,N], and at the segment's start [BH,N,N].
    """
    solver_t = _t(p.solver)
    z = solver_t @ (_t(p.products[..., CHUNK:, :CHUNK]) @ zdy[..., CHUNK:, :])
    from_state = solver_t @ p.right_end[..., :CHUNK, :]  # Z += from_state @ G^T
    grads = p.states.new_empty(p.states.shape)
    grads[-1] = g
    *before, g = grads.unbind()
    walk = list(zip(z, from_state, zdy, p.left_start, p.total, before, strict=True))
    for z_c, from_state_c, zdy_c, left_c, total_c, next_g in reversed(walk):
        zdy_c[:, :CHUNK] = z_c.baddbmm_(from_state_c, _t(g))
        g = torch.mul(g, total_c, out=next_g).baddbmm_(_t(zdy_c), left_c)
    return grads[1:], grads[0]


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)
