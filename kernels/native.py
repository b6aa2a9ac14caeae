"""The compiled WKV operators as PyTorch custom operators: `rwkv_cluster::wkv7` and `rwkv_cluster::wkv6`.

The libraries behind them (csrc/wkv.h says what they compute and keep) are built ahead of time; here they are given
PyTorch's tensors, stream and number of threads, and a place in autograd and torch.compile. RWKV-5 is RWKV-6 with one
decay [H,N]. Forward keeps the state of every 16th step for backward, as bytes that only the kernel understands.

Legend: B batch, T time, H heads, N head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.signatures import Problem
from rwkv_cluster.kernels.sizes import (
    CPU_LARGEST_HEAD_SIZE,
    CUDA_HEAD_SIZES,
    STEPS_BETWEEN_STATES,
    TENSOR_CORE_HEAD_SIZE,
)

EXACT, TENSOR_CORES, TENSOR_CORES_16 = 0, 1, 2
IO = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGNMENT = 16
"""Bytes that the CUDA kernels read at a time."""


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """RWKV-5's operator with the arguments and results of `reference.wkv5`; differentiable once in every argument.

    exact: fp32 maths also where a kernel with bf16 products exists. Inputs float32, bfloat16 or float16.
    """
    return wkv6(r, k, v, w.float(), u, state, starts=starts, exact=exact)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's operator with the arguments and results of `reference.wkv6`; differentiable once. exact: fp32 maths."""
    inputs = _contiguous(r, k, v, w, u.float(), state)
    y, final_state, _ = torch.ops.rwkv_cluster.wkv6(*inputs, starts, exact, _needs_gradient(inputs))
    return y, final_state


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
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's operator with the arguments and results of `reference.wkv7`; differentiable once. exact: fp32 maths."""
    inputs = _contiguous(r, w, k, v, a, b, state)
    y, final_state, _ = torch.ops.rwkv_cluster.wkv7(*inputs, starts, exact, _needs_gradient(inputs))
    return y, final_state


@torch.compiler.assume_constant_result
def unavailable(device: str, dtype: torch.dtype, size: int) -> str | None:
    """Why no compiled kernel takes `dtype` and head size `size` on `device`, e.g. "cuda:0"; None where one does.

    A sentence. The libraries are looked for once in a process.
    """
    where = torch.device(device)
    if dtype not in IO:
        return f"The compiled WKV kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}."
    if where.type not in ("cpu", "cuda"):
        return f'The compiled WKV kernels run on "cpu" and "cuda", not on "{where.type}".'
    if where.type == "cpu" and size > CPU_LARGEST_HEAD_SIZE:
        return f"The compiled CPU kernels have head sizes up to {CPU_LARGEST_HEAD_SIZE}, not {size}."
    if where.type == "cuda" and size not in CUDA_HEAD_SIZES:
        *sizes, last = CUDA_HEAD_SIZES
        return f"The compiled CUDA kernels have head sizes {', '.join(map(str, sizes))} and {last}, not {size}."
    library = find_library(where)
    return library.reason if isinstance(library, loader.Missing) else None


def saved_bytes(version: int, shape: Sequence[int], kernel: int) -> int:
    """Bytes that forward keeps for backward; equals rwkv_saved_bytes of the library, and takes symbolic shapes."""
    batch, time, heads, size = shape
    states = batch * heads * ((time + STEPS_BETWEEN_STATES - 1) // STEPS_BETWEEN_STATES) * size * size
    if kernel != EXACT:
        return 2 * states
    return 4 * (states + batch * time * heads * size if version == 7 else states)


def _contiguous(*inputs: Tensor | None) -> list[Tensor | None]:
    """The inputs as the kernels read them: [B,T,H,N] in the first one's dtype, and the last, the state, in float32."""
    *tensors, state = inputs
    assert tensors[0] is not None
    dtype = tensors[0].dtype
    alike = [x.to(dtype) if x is not None and x.ndim == 4 and x.dtype != dtype else x for x in tensors]
    return [None if x is None else x.contiguous() for x in (*alike, None if state is None else state.float())]


def _needs_gradient(inputs: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _kernel(r: Tensor, exact: bool) -> int:
    fast = r.device.type == "cuda" and r.dtype == torch.bfloat16 and r.shape[-1] == TENSOR_CORE_HEAD_SIZE
    return TENSOR_CORES if fast and not exact else EXACT


def find_library(device: torch.device) -> loader.Library | loader.Missing:
    """The compiled library for `device`, "cpu" or a CUDA device; it is looked for once in a process."""
    if device.type == "cpu":
        return loader.cpu()
    return loader.cuda(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _library(device: torch.device) -> loader.Library:
    library = find_library(device)
    if isinstance(library, loader.Missing):
        raise KernelError(library.reason)
    return library


def _call(name: str, kernel: int, starts: Tensor | None, inputs: Sequence[Tensor], *others: Tensor | None) -> None:
    """Run a library's function on the operator's inputs, r first, and other tensors; None is a null pointer."""
    r = inputs[0]
    library = _library(r.device)
    batch, time, heads, size = r.shape
    problem = Problem(
        batch=batch,
        time=time,
        heads=heads,
        size=size,
        io=IO[r.dtype],
        kernel=kernel,
        threads=torch.get_num_threads(),
        constant_decay=_has_constant_decay(inputs),
        stream=torch.cuda.current_stream(r.device).cuda_stream if r.is_cuda else None,
        starts=None if starts is None else starts.data_ptr(),
    )
    pointers = [None if x is None else x.data_ptr() for x in (*inputs, *others)]
    with torch.cuda.device_of(r):
        status = getattr(library.handle, name)(ctypes.byref(problem), *pointers)
    library.check(name, status, f"{r.dtype} {tuple(r.shape)} on {r.device}")


def _has_constant_decay(inputs: Sequence[Tensor]) -> bool:
    return inputs[3].ndim == 2  # k [B,T,H,N] of wkv7, w of wkv6


def _forward(version: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, starts, exact, save = arguments
    *inputs, state = _as_read(tensors)
    y, final_state, saved = outputs = _empty_outputs(version, *arguments)
    kernel = _kernel(inputs[0], exact)
    _call(
        f"rwkv_wkv{version}_forward", kernel, _as_starts(starts), inputs, state, y, final_state, saved if save else None
    )
    return outputs


def wkv7_forward(inputs: Sequence[Tensor], kernel: int) -> Tensor:
    """RWKV-7's y by TENSOR_CORES or TENSOR_CORES_16, with what backward would need of it and without autograd.

    Measures the form that is not chosen by itself. inputs: r, w, k, v, a, b [B,T,H,64] in bfloat16 on a GPU.

    Raises:
        KernelError: there is no library for these inputs.
    """
    tensors = _as_read([x.detach() for x in inputs])
    r = tensors[0]
    if _kernel(r, exact=False) == EXACT:
        raise KernelError(f"Tensor cores take bfloat16 on a GPU, head size {TENSOR_CORE_HEAD_SIZE}, not these inputs.")
    y, final_state = _empty_like(r), _empty_state(r)
    saved = r.new_empty(saved_bytes(7, r.shape, kernel), dtype=torch.uint8)
    _call("rwkv_wkv7_forward", kernel, None, tensors, None, y, final_state, saved)
    return y


def _as_read(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Inputs contiguous and aligned to 16 bytes, which are read at once: a view into a tensor may begin anywhere."""
    return [None if x is None else aligned(x) for x in tensors]


def aligned(x: Tensor) -> Tensor:
    """x contiguous and at an address that the kernels can read 16 bytes at: itself, or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _as_starts(starts: Tensor | None) -> Tensor | None:
    """[B,T], a byte each, as the kernels read them."""
    return None if starts is None else starts.to(torch.bool).contiguous()


def _empty_outputs(version: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, final state and bytes for backward (none without `save`)."""
    r, exact, save = arguments[0], *arguments[-2:]
    n_bytes = saved_bytes(version, r.shape, _kernel(r, exact)) if save else 0
    return _empty_like(r), _empty_state(r), r.new_empty(n_bytes, dtype=torch.uint8)


def _backward(version: int, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, starts, exact = arguments
    *inputs, saved, dy, dfinal_state = _as_read(tensors)
    gradients = _empty_gradients(version, *arguments)
    kernel = _kernel(inputs[0], exact)
    _call(f"rwkv_wkv{version}_backward", kernel, _as_starts(starts), inputs, saved, dy, dfinal_state, *gradients)
    return gradients


def _empty_gradients(version: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Uninitialised gradients of the inputs and the state; those of u and of a constant w by batch row, [B,H,N]."""
    *inputs, _saved, _dy, _dfinal_state, _starts, _exact = arguments
    r = inputs[0]
    batch, _, heads, size = r.shape
    per_row = (batch, heads, size)
    grads = (_empty_like(x) if x.ndim == 4 else r.new_empty(per_row, dtype=torch.float32) for x in inputs)
    return *grads, _empty_state(r)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_state(r: Tensor) -> Tensor:
    batch, _, heads, size = r.shape
    return r.new_empty(batch, heads, size, size, dtype=torch.float32)


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *tensors, state, starts, exact, _save = inputs
    ctx.save_for_backward(*tensors, starts, output[2])
    ctx.exact, ctx.has_state = exact, state is not None
    ctx.set_materialize_grads(False)


def _formula(version: int, ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    backward = getattr(torch.ops.rwkv_cluster, f"wkv{version}_backward")
    *inputs, starts, saved = ctx.saved_tensors  # once: activation checkpointing unpacks them at each asking
    *gradients, dstate = backward(*inputs, saved, dy, dfinal_state, starts, ctx.exact)
    summed = (g.sum(0) if g.ndim > x.ndim else g for g, x in zip(gradients, inputs, strict=True))
    return *summed, dstate if ctx.has_state else None, None, None, None


def _register(version: int, inputs: str, n_inputs: int) -> None:
    """The custom operators of a version, forward and backward, with one implementation for CPU and CUDA tensors."""
    name, backward = f"rwkv_cluster::wkv{version}", f"rwkv_cluster::wkv{version}_backward"
    outputs = "(Tensor y, Tensor final_state, Tensor saved)"
    gradients = ", ".join(["Tensor"] * (n_inputs + 1))
    tags = (torch.Tag.pt2_compliant_tag,)
    torch.library.define(
        name, f"({inputs}, Tensor? state, Tensor? starts, bool exact, bool save) -> {outputs}", tags=tags
    )
    received = "Tensor saved, Tensor? dy, Tensor? dfinal_state, Tensor? starts, bool exact"
    torch.library.define(backward, f"({inputs}, {received}) -> ({gradients})", tags=tags)
    torch.library.impl(name, ("cpu", "cuda"), partial(_forward, version))
    torch.library.impl(backward, ("cpu", "cuda"), partial(_backward, version))
    torch.library.register_fake(name, partial(_empty_outputs, version))
    torch.library.register_fake(backward, partial(_empty_gradients, version))
    torch.library.register_autograd(name, partial(_formula, version), setup_context=_setup)


_register(7, "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b", 6)
_register(6, "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u", 5)
