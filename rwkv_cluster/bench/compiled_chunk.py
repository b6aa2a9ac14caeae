"""RWKV-7's operator in plain differentiable PyTorch, in chunks of 32, for torch.compile: the fastest rival without C++.

The algebra of `rwkv_cluster.kernels.chunked.wkv7`, left to autograd and the compiler. For float32, decays as models
have them, and times that are a multiple of the chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_cluster.kernels.reference import LOG_DECAY_SCALE

CHUNK = 32


@functools.cache
def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """`wkv7` under torch.compile, which takes about a minute at its first call for each shape."""
    return torch.compile(wkv7, dynamic=False)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.wkv7` from a zero state; T a multiple of CHUNK (or shorter)."""
    batch, time, heads, size = r.shape
    length = min(CHUNK, time)

    def chunks(x: Tensor) -> Tensor:  # [B,T,H,N] -> [n,B,H,L,N]
        return x.float().unflatten(1, (time // length, length)).permute(1, 0, 3, 2, 4)

    step = LOG_DECAY_SCALE * torch.sigmoid(chunks(w))
    total = step.cumsum(-2)
    grown = torch.exp(-total)
    values, ki, bi = chunks(v), chunks(k) * grown, chunks(b) * grown
    rq, aq = chunks(r) * torch.exp(total), chunks(a) * torch.exp(total - step)
    ab, ak = (aq @ bi.mT).tril(-1), (aq @ ki.mT).tril(-1)
    qb, qk = (rq @ bi.mT).tril(), (rq @ ki.mT).tril()
    identity = torch.eye(length, dtype=ab.dtype, device=ab.device)
    solved = torch.linalg.solve_triangular(identity - ab, torch.cat([ak @ values, aq], dim=-1), upper=False)
    state = values.new_zeros(batch, heads, size, size)  # [value, key]
    outputs = []
    parts = (solved, values, rq, qb, qk, ki, bi, torch.exp(total[..., -1:, :]))
    for solved_c, v_c, rq_c, qb_c, qk_c, ki_c, bi_c, decay in zip(*(x.unbind(0) for x in parts), strict=True):
        from_values, from_state = solved_c.split(size, dim=-1)
        u = from_values + from_state @ state.mT
        outputs.append(rq_c @ state.mT + qk_c @ v_c + qb_c @ u)
        state = (state + v_c.mT @ ki_c + u.mT @ bi_c) * decay
    y = torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return y.to(r.dtype), state
