"""Call a kernel library directly, past PyTorch: NaN in its outputs beforehand, null pointers on request."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from naive_wkv import output_gradients
from torch import Tensor

from rwkv_cluster.kernels.native import IO
from rwkv_cluster.kernels.signatures import Problem

EXACT, TENSOR_CORES, TENSOR_CORES_16 = 0, 1, 2


def values_and_gradients(
    library: ctypes.CDLL,
    version: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    kernel: int = EXACT,
    threads: int = 1,
    gradients: tuple[Tensor | None, Tensor | None] | None = None,
    starts: Tensor | None = None,
) -> list[Tensor]:
    """`naive_wkv.values_and_gradients` by a library: y, final state, the gradients in the inputs' order, the state's.

    inputs: float64, the state last; None for the state is a null pointer. gradients: of y and the final state, None
    for null pointers; by default `output_gradients`. starts: bool [B,T], contiguous.
    """
    *tensors, state = inputs
    digits, constant = int(version[-1]), version == "wkv5"
    tensors = [x.to(torch.float32 if x.ndim == 2 else dtype).contiguous() for x in tensors]
    state = None if state is None else state.float().contiguous()
    batch, time, heads, size = tensors[0].shape
    problem = Problem(
        batch=batch, time=time, heads=heads, size=size, io=IO[dtype], kernel=kernel, threads=threads,
        constant_decay=constant, starts=None if starts is None else starts.data_ptr(),
    )  # fmt: skip
    c_version = 7 if digits == 7 else 6
    saved = _poisoned((library.rwkv_saved_bytes(c_version, ctypes.byref(problem)) // 4,), torch.float32)
    y, final = _poisoned(tensors[0].shape, dtype), _poisoned((batch, heads, size, size), torch.float32)
    name = f"rwkv_wkv{c_version}"
    _call(library, f"{name}_forward", problem, *tensors, state, y, final, saved)
    dy, dfinal = output_gradients([inputs[0], final]) if gradients is None else gradients
    dy = None if dy is None else dy.to(dtype).contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    row = (batch, heads, size)
    outputs = [_poisoned(row if x.ndim == 2 else x.shape, x.dtype) for x in tensors]
    dstate = _poisoned(final.shape, torch.float32)
    _call(library, f"{name}_backward", problem, *tensors, saved, dy, dfinal, *outputs, dstate)
    summed = [g.sum(0) if g.ndim == 3 else g for g in outputs]
    return [y, final, *summed, dstate]


def _call(library: ctypes.CDLL, name: str, problem: Problem, *tensors: Tensor | None) -> None:
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    status = getattr(library, name)(ctypes.byref(problem), *pointers)
    assert status == 0, library.rwkv_status_text(status)


def _poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), math.nan, dtype=dtype)
