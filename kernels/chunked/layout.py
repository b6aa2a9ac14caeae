"""Layout of time in the chunked operators: tensors [B,T,H,N] seen as chunks [n,B,H,L,N], segment by segment.

A segment is a run of chunks small enough that its working set stays in a core's cache.

Legend: B batch, T time, H heads, N head size, L chunk length, n chunks in the segment.
"""

from __future__ import annotations

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
