"""Layout of time in the chunked operators: tensors [B,T,H,N] seen as chunks [n,B,H,L,N], segment by segment.

A segment is a run of chunks small enough that its working set stays in a core's cache.

Legend: B batch, T time, H heads, N head size, L chunk length, n chunks in the segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rwkv_cluster.kernels.reference import compute_dtype
from rwkv_cluster.kernels.sizes import SEGMENT_BYTES


def segments(x: Tensor, chunk: int) -> list[slice]:
    """Slices of x's [B,T,H,N] time, each of whole chunks but for the very last. One slice off the CPU."""
    batch, time, heads, size = x.shape
    chunk_bytes = batch * heads * size * chunk * compute_dtype(x).itemsize
    length = chunk * max(1, SEGMENT_BYTES // chunk_bytes) if x.device.type == "cpu" else time
    return [slice(start, min(start + length, time)) for start in range(0, time, length)]


def load(x: Tensor, segment: slice, chunk: int, fill: float = 0.0) -> Tensor:
    """x [B,T,H,N] over `segment` as [n,B,H,L,N] in the computing dtype; a short last chunk gets `fill`.

    For float32 and float64 this is a view with strides: let the first arithmetic read it.
    """
    x = x[:, segment].to(compute_dtype(x))
    missing = -x.shape[1] % chunk
    if missing:
        x = pad(x, (0, 0, 0, 0, 0, missing), value=fill)
    return _chunks(x, chunk)


@dataclass(frozen=True)
class Documents:
    """Which positions of a segment's chunks belong together, each [n,B,1,..] for all heads."""

    apart: Tensor  # bool [n,B,1,L,L], true for two positions of different documents
    first: Tensor  # [n,B,1,L,1], 1 for what the state at the chunk's start belongs to, else 0
    last: Tensor  # [n,B,1,L,1], 1 for what the state at the chunk's end belongs to, else 0
    through: Tensor  # [n,B,1,1,1], 1 where no document begins in the chunk, else 0


def documents(starts: Tensor | None, segment: slice, chunk: int, dtype: torch.dtype) -> Documents | None:
    """The documents in `segment` of `starts`, bool [B,T]; factors in `dtype`. None where `starts` is None."""
    if starts is None:
        return None
    begins = starts[:, segment].int()
    begins = pad(begins, (0, -begins.shape[1] % chunk))
    number = begins.unflatten(1, (-1, chunk)).cumsum(-1).transpose(0, 1).unsqueeze(2)  # [n,B,1,L]
    last = number[..., -1:]
    return Documents(
        apart=number.unsqueeze(-1) != number.unsqueeze(-2),
        first=(number == 0).to(dtype).unsqueeze(-1),
        last=(number == last).to(dtype).unsqueeze(-1),
        through=(last == 0).to(dtype).unsqueeze(-1),
    )


def empty_padded(x: Tensor, chunk: int) -> Tensor:
    """An uninitialised tensor like x [B,T,H,N] with T rounded up to whole chunks."""
    batch, time, heads, size = x.shape
    return x.new_empty(batch, time + -time % chunk, heads, size)


def store(out: Tensor, segment: slice, chunk: int) -> Tensor:
    """The part of `out`, from `empty_padded`, that belongs to `segment`, as a [n,B,H,L,N] view to write to."""
    stop = segment.stop + -segment.stop % chunk
    return _chunks(out[:, segment.start : stop], chunk)


def trimmed(out: Tensor, time: int) -> Tensor:
    """`out` without its padding, contiguous."""
    return out if out.shape[1] == time else out[:, :time].contiguous()


def empty_chunks(like: Tensor, rows: int) -> Tensor:
    """Uninitialised contiguous [n,B,H,rows,N] for `like` [n,B,H,L,N]."""
    n, batch, heads, _, size = like.shape
    return torch.empty(n, batch, heads, rows, size, dtype=like.dtype, device=like.device)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)
