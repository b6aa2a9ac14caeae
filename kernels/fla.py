"""The WKV operators through flash-linear-attention's Triton kernels, where that package and a GPU are.

Never chosen by "auto". Its arguments differ from ours: the decay is given as log d, the scale must be 1, and states are
[key, value] for RWKV-7 too. Sums and states are fp32 inside, products in the inputs' dtype (TF32 for float32).
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import reference
from rwkv_cluster.kernels.reference import LOG_DECAY_SCALE, initial_state


def require(device: torch.device) -> None:
    """Raise KernelError where the package or a GPU that Triton serves is missing."""
    if device.type == "cpu":
        raise KernelError(
            'wkv_backend "fla" is Triton code and needs a GPU, and this run is on a CPU',
            remedy='Use wkv_backend "auto"',
        )
    _module("rwkv7")


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
    """RWKV-5's operator with the arguments and results of `reference.wkv5`."""
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
    """RWKV-6's operator with the arguments and results of `reference.wkv6`."""
    if starts is not None:
        return reference.wkv6(r, k, v, w, u, state, starts=starts)
    log_decay = -torch.exp(w.float())
    start = None if state is None else initial_state(r, state)
    y, final = _module("rwkv6").chunk_rwkv6(
        r, k, v, log_decay, u, scale=1.0, initial_state=start, output_final_state=True
    )
    return y.to(r.dtype), final


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
    """RWKV-7's operator with the arguments and results of `reference.wkv7`.

    Versions that take a lower bound of log d go the fast way with it: chunks of 64 on tensor cores, instead of 16.
    """
    if starts is not None:
        return reference.wkv7(r, w, k, v, a, b, state, starts=starts)
    log_decay = LOG_DECAY_SCALE * torch.sigmoid(w.float())
    start = None if state is None else initial_state(r, state).transpose(-1, -2).contiguous()
    operator = _module("rwkv7").chunk_rwkv7
    bounded = "lower_bound" in inspect.signature(operator).parameters
    bound = {"lower_bound": LOG_DECAY_SCALE} if bounded else {}
    y, final = operator(r, log_decay, k, v, a, b, scale=1.0, initial_state=start, output_final_state=True, **bound)
    return y.to(r.dtype), final.transpose(-1, -2)


def _module(version: str) -> Any:
    try:
        return importlib.import_module(f"fla.ops.{version}")
    except ImportError as error:
        raise KernelError(
            f'wkv_backend "fla" needs the package flash-linear-attention ({error})',
            remedy="`pip install 'rwkv-cluster[fla]'` installs it",
        ) from error
