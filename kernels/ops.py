"""The door to the WKV operators: checks shapes once and picks a backend.

Every model calls these three functions, so a faster backend only has to be added to `_BACKENDS`.
Arguments, layouts and results are those of `rwkv_cluster.kernels.reference`.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import chunked, reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}

BACKENDS: tuple[str, ...] = ("auto", *_BACKENDS)
"""Accepted values of `backend`. "auto" is the time loop for a few tokens and the chunked form for more."""

LOOP_TOKENS = 4
"""Up to here the time loop is the faster of the two (measured without gradients, one row of 4 heads of 64)."""


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-5's operator: r, k, v [B,T,H,N]; raw w and u [H,N]; state [B,H,N,N] indexed [key, value].

    Returns:
        y [B,T,H,N] in r's dtype and the final state [B,H,N,N], float32 or (for float64 inputs) float64.

    Raises:
        KernelError: unknown backend, or shapes that do not belong together.
    """
    _check(r, {"k": k, "v": v}, {"w": w, "u": u}, state)
    return _module(backend, r).wkv5(r, k, v, w, u, state)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-6's operator: r, k, v, raw w [B,T,H,N]; u [H,N]; state [B,H,N,N] indexed [key, value].

    Returns:
        y [B,T,H,N] in r's dtype and the final state [B,H,N,N], float32 or (for float64 inputs) float64.

    Raises:
        KernelError: unknown backend, or shapes that do not belong together.
    """
    _check(r, {"k": k, "v": v, "w": w}, {"u": u}, state)
    return _module(backend, r).wkv6(r, k, v, w, u, state)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-7's operator: r, raw decay logit w, k, v, a, b [B,T,H,N]; state [B,H,N,N] indexed [value, key].

    Returns:
        y [B,T,H,N] in r's dtype and the final state [B,H,N,N], float32 or (for float64 inputs) float64.

    Raises:
        KernelError: unknown backend, or shapes that do not belong together.
    """
    _check(r, {"w": w, "k": k, "v": v, "a": a, "b": b}, {}, state)
    return _module(backend, r).wkv7(r, w, k, v, a, b, state)


def _module(backend: str, r: Tensor) -> ModuleType:
    if backend == "auto":
        return reference if r.shape[1] <= LOOP_TOKENS else chunked
    if backend not in _BACKENDS:
        raise KernelError(f'Unknown WKV backend "{backend}". Use one of: {", ".join(BACKENDS)}.')
    return _BACKENDS[backend]


def _check(r: Tensor, like_r: dict[str, Tensor], per_head: dict[str, Tensor], state: Tensor | None) -> None:
    if r.ndim != 4 or 0 in r.shape:
        raise KernelError(f"WKV input r has shape {tuple(r.shape)}, expected a non-empty [B, T, H, N].")
    batch, _, heads, size = r.shape
    wanted = {name: (x, tuple(r.shape)) for name, x in like_r.items()}
    wanted |= {name: (x, (heads, size)) for name, x in per_head.items()}
    if state is not None:
        wanted["state"] = (state, (batch, heads, size, size))
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise KernelError(
                f"WKV input {name} has shape {tuple(x.shape)}, expected {shape} beside r {tuple(r.shape)}."
            )
