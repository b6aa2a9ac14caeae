"""The WKV operators through flash-linear-attention's Triton kernels, where that package and a GPU are.

Never chosen by "auto". Its arguments differ from ours: the decay is given as log d, the scale must be 1, and states are
[key, value] for RWKV-7 too. Sums and states are fp32 inside, products in the inputs' dtype (TF32 for float32).
Documents are one row for it, whatever row of ours they are in: batch size 1, their offsets as `cu_seqlens`, and an
initial and a final state for each.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_cluster.errors import KernelError
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
    log_decay = -torch.exp(w.float())
    start = None if state is None else initial_state(r, state)
    y, final = _run(_module("rwkv6").chunk_rwkv6, (r, k, v, log_decay, u), start, starts)
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
    log_decay = LOG_DECAY_SCALE * torch.sigmoid(w.float())
    start = None if state is None else initial_state(r, state).transpose(-1, -2).contiguous()
    operator = _module("rwkv7").chunk_rwkv7
    bounded = "lower_bound" in inspect.signature(operator).parameters
    bound = {"lower_bound": LOG_DECAY_SCALE} if bounded else {}
    y, final = _run(partial(operator, **bound), (r, log_decay, k, v, a, b), start, starts)
    return y.to(r.dtype), final.transpose(-1, -2)


class Sequences(NamedTuple):
    """The documents of rows [B,T] laid end to end."""

    offsets: Tensor  # int64 [D+1], from 0 to B T: `cu_seqlens`
    first: Tensor  # int64 [B], each row's first document; it goes on from the row's state unless it begins there
    last: Tensor  # int64 [B], each row's last document, whose final state is the row's


def sequences(starts: Tensor) -> Sequences:
    """The documents of `starts`, bool [B,T]. On a GPU this waits for their number."""
    begins = starts.clone()
    begins[:, 0] = True
    offsets = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    count = begins.sum(1)
    end = count.cumsum(0)
    return Sequences(offsets, end - count, end - 1)


_Operator = Callable[..., tuple[Tensor, Tensor]]


def _run(
    operator: _Operator, tensors: Sequence[Tensor], state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,N] and final states of `operator` on `tensors`, [B,T,H,N] all but u, from its [key, value] states."""
    operator = partial(operator, scale=1.0, output_final_state=True)
    if starts is None:
        return operator(*tensors, initial_state=state)
    offsets, first, last = sequences(starts)
    if state is not None:
        state = state.masked_fill(starts[:, 0, None, None, None], 0.0)
        state = state.new_zeros(len(offsets) - 1, *state.shape[1:]).index_copy(0, first, state)
    rows = [x.flatten(0, 1).unsqueeze(0) if x.ndim == 4 else x for x in tensors]
    y, final = operator(*rows, initial_state=state, cu_seqlens=offsets)
    return y.view(tensors[0].shape), final.index_select(0, last)


def _module(version: str) -> Any:
    try:
        return importlib.import_module(f"fla.ops.{version}")
    except ImportError as error:
        raise KernelError(
            f'wkv_backend "fla" needs the package flash-linear-attention ({error})',
            remedy="`pip install 'rwkv-cluster[fla]'` installs it",
        ) from error
