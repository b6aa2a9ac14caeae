"""Public WKV operators: shape checks and backend choice.

Arguments, layouts and results are those of `rwkv_cluster.kernels.reference`. Backends:

- reference: the time loop, in PyTorch.
- chunked: the chunked matrix form, in PyTorch, on any device.
- native: the compiled kernel. On CUDA, which has head sizes 32, 64 and 128, bfloat16 with 64 runs on the tensor cores
  (bf16 products, fp32 accumulation); everything else, and everything on a CPU, has fp32 maths.
- exact: the compiled kernel with fp32 maths.
- fla: flash-linear-attention, where it is installed. Never chosen by "auto".
- auto: the time loop for a few tokens, else native where a compiled kernel fits the inputs, else chunked. A missing
  library is told once in the log.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import native, reference
from rwkv_cluster.kernels.chunked import wkv as chunked

BACKENDS = ("auto", "reference", "chunked", "native", "exact", "fla")
"""Accepted values of `backend`."""

LOOP_TOKENS = 4
"""Up to here the time loop is the fastest (measured without gradients, one row of 4 heads of 64)."""

_Operator = Callable[..., tuple[Tensor, Tensor]]


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-5's operator: r, k, v [B,T,H,N]; raw w and u [H,N]; state [B,H,N,N] indexed [key, value].

    starts: bool [B,T], true where a document begins: the state before that step is zero, a given one at step 0 too.

    Returns:
        y [B,T,H,N] in r's dtype and the final state [B,H,N,N], float32 or (for float64 inputs) float64.

    Raises:
        KernelError: unknown backend, or shapes or dtypes that do not belong together.
    """
    _check(r, {"k": k, "v": v}, {"w": w, "u": u}, state, starts)
    return _operator("wkv5", backend, r)(r, k, v, w, u, state, starts=starts)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-6's operator: r, k, v, raw w [B,T,H,N]; u [H,N]; state [B,H,N,N] indexed [key, value].

    starts: bool [B,T], true where a document begins: the state before that step is zero, a given one at step 0 too.

    Returns:
        y [B,T,H,N] in r's dtype and the final state [B,H,N,N], float32 or (for float64 inputs) float64.

    Raises:
        KernelError: unknown backend, or shapes or dtypes that do not belong together.
    """
    _check(r, {"k": k, "v": v, "w": w}, {"u": u}, state, starts)
    return _operator("wkv6", backend, r)(r, k, v, w, u, state, starts=starts)


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-7's operator: r, raw decay logit w, k, v, a, b [B,T,H,N]; state [B,H,N,N] indexed [value, key].

    starts: bool [B,T], true where a document begins: the state before that step is zero, a given one at step 0 too.

    Returns:
        y [B,T,H,N] in r's dtype and the final state [B,H,N,N], float32 or (for float64 inputs) float64.

    Raises:
        KernelError: unknown backend, or shapes or dtypes that do not belong together.
    """
    _check(r, {"w": w, "k": k, "v": v, "a": a, "b": b}, {}, state, starts)
    return _operator("wkv7", backend, r)(r, w, k, v, a, b, state, starts=starts)


def resolved(backend: str, r: Tensor) -> str:
    """What `backend` is for inputs like r [B,T,H,N]: "auto" chooses by their length, dtype and device."""
    return _automatic(r) if backend == "auto" else backend


def require(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Raise the KernelError that using `backend` on such inputs would, before there are any."""
    if backend in ("native", "exact") and (reason := native.unavailable(str(device), dtype, head_size)):
        raise KernelError(f'{reason} wkv_backend "{backend}" needs a compiled kernel; "auto" takes what there is.')
    if backend == "fla":
        _fla().require(device)


def _operator(version: str, backend: str, r: Tensor) -> _Operator:
    if backend not in BACKENDS:
        raise KernelError(f'Unknown WKV backend "{backend}"', remedy=f"Use one of: {', '.join(BACKENDS)}.")
    if backend == "auto":
        backend = resolved(backend, r)
    else:
        require(backend, r.device, r.dtype, r.shape[-1])
    if backend in ("native", "exact"):
        return functools.partial(getattr(native, version), exact=backend == "exact")
    module = {"reference": reference, "chunked": chunked}.get(backend) or _fla()
    operator: _Operator = getattr(module, version)
    return operator


def _fla() -> ModuleType:
    return importlib.import_module("rwkv_cluster.kernels.fla")


def _automatic(r: Tensor) -> str:
    if r.shape[1] <= LOOP_TOKENS:
        return "reference"
    reason = native.unavailable(str(r.device), r.dtype, r.shape[-1])
    if reason is None:
        return "native"
    if r.dtype in native.IO:
        _tell(reason)
    return "chunked"


@torch.compiler.assume_constant_result
@functools.cache
def _tell(reason: str) -> None:
    """Say once in a process why the compiled kernels are not used."""
    logging.getLogger("rwkv_cluster").warning("%s Until then WKV runs in PyTorch, in chunked form.", reason)


def _check(
    r: Tensor, like_r: dict[str, Tensor], per_head: dict[str, Tensor], state: Tensor | None, starts: Tensor | None
) -> None:
    if r.ndim != 4 or 0 in r.shape:
        raise KernelError(f"WKV input r has shape {tuple(r.shape)}, expected a non-empty [B, T, H, N].")
    batch, time, heads, size = r.shape
    expected = {name: (x, tuple(r.shape)) for name, x in like_r.items()}
    expected |= {name: (x, (heads, size)) for name, x in per_head.items()}
    if state is not None:
        expected["state"] = (state, (batch, heads, size, size))
    if starts is not None:
        expected["starts"] = (starts, (batch, time))
        if starts.dtype != torch.bool:
            raise KernelError(f"WKV input starts has dtype {starts.dtype}, expected torch.bool.")
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise KernelError(
                f"WKV input {name} has shape {tuple(x.shape)}, expected {shape} beside r {tuple(r.shape)}."
            )
