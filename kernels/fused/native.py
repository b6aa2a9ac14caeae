"""The passes of `fused.ops` in the compiled libraries: autograd functions over csrc/fused.h, with fp32 arithmetic.

The CPU's and CUDA's have the same functions. Gradients of parameters are summed over fixed blocks of rows in a fixed
order: no number of threads changes them, and no two runs on a GPU differ.

Legend: B batch, T time, H heads, N head size, C = H N, R = B T.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.native import IO, aligned, find_library
from rwkv_cluster.kernels.signatures import Rows
from rwkv_cluster.kernels.sizes import FUSED_MULTIPLE, has_fused_passes

ROWS_IN_BLOCK = 64
FEWEST_ROWS_IN_BLOCK, BLOCKS_OF_A_GPU = 16, 512
"""Rows that norm_mix adds up in a block, and the blocks that it should have for a GPU to be busy with few rows."""


def serves(x: Tensor, size: int | None = None) -> bool:
    """Whether there is a library for x's device whose passes take x [..,C]. size: N, for a pass over heads."""
    if x.dtype not in IO or not has_fused_passes(x.device.type, x.shape[-1], size):
        return False
    return isinstance(find_library(x.device), loader.Library)


def mix(x: Tensor, mixes: Sequence[Tensor], starts: Tensor | None = None) -> tuple[Tensor, ...]:
    """Token shift: x [B,T,C] + (x one step earlier - x) * m for each m of `mixes`, parameters of C elements.

    starts: bool [B,T], true where a document begins: zeros come before that step.
    """
    if starts is not None:
        starts = starts.contiguous()
    result: tuple[Tensor, ...] = _Mix.apply(aligned(x), starts, *_parameters(*mixes))
    return result


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor | None],
    starts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x + branch, and for each m of `mixes`, 1, 2, 4 or 6, the token shift of its layer norm, or that itself for None.

    x, branch: [B,T,C]; weight, bias, mixes: C elements; starts: bool [B,T], as for mix.
    """
    if starts is not None:
        starts = starts.contiguous()
    branch = None if branch is None else _like(x, branch)
    result: tuple[Tensor, ...] = _NormMix.apply(aligned(x), branch, starts, *_parameters(*mixes, weight, bias))
    return result


def shift_blend(
    x: Tensor, mixes: Sequence[Tensor], constants: Sequence[Tensor], starts: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Token shift of RWKV-6: x [B,T,C] + (x one step earlier - x) * (m + c) for each m, c of `mixes` and `constants`.

    mixes: five [B,T,C]; constants: parameters of C elements. starts: bool [B,T], true where a document begins.
    """
    if starts is not None:
        starts = starts.contiguous()
    data = (_like(x, m) for m in mixes)
    result: tuple[Tensor, ...] = _ShiftBlend.apply(len(mixes), aligned(x), starts, *data, *_parameters(*constants))
    return result


def sigmoid_gate(gate: Tensor, value: Tensor) -> Tensor:
    """sigmoid(gate) * value; all [B,T,C]."""
    result: Tensor = _SigmoidGate.apply(_like(value, gate), aligned(value))
    return result


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2; x [B,T,C]."""
    result: Tensor = _SquaredRelu.apply(aligned(x))
    return result


def prepare(
    r: Tensor,
    k: Tensor,
    a: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    v_mix: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    a0: Tensor,
    v0: Tensor | None,
) -> tuple[Tensor, ...]:
    """RWKV-7's pass before WKV: arguments and results of `reference.prepare`."""
    tensors = (None if x is None else _like(k, x) for x in (r, k, a, v, v_first, v_mix))
    parameters = _parameters(k_k, k_a, r_k, a0, v0)
    result: tuple[Tensor, ...] = _Prepare.apply(r_k.shape[-1], *tensors, *parameters)
    return result


def gated_readout(y: Tensor, v: Tensor, bonus: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """RWKV-7's reading: y [B,T,H,N], v, gate [B,T,C], bonus [B,T,H], weight and bias [C] -> [B,T,C]."""
    tensors = (_like(gate, y), _like(gate, v), aligned(bonus.float()), aligned(gate))
    result: Tensor = _Read.apply(*tensors, *_parameters(weight, bias))
    return result


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The reading of RWKV-5 and 6: y [B,T,H,N], gate [B,T,C], weight and bias [C] -> [B,T,C]."""
    result: Tensor = _GatedNorm.apply(_like(gate, y), aligned(gate), *_parameters(weight, bias))
    return result


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor | None, *mixes: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, starts, *mixes)
        outputs = tuple(torch.empty_like(x) for _ in mixes)
        arguments = (len(mixes), x, _addresses(mixes), _addresses(outputs))
        _call("rwkv_mix_forward", x, FUSED_MULTIPLE, *arguments, starts=starts)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        x, starts, *mixes = ctx.saved_tensors
        doutputs = tuple(aligned(g) for g in doutputs)
        dx, dmixes = torch.empty_like(x), _partial(x, len(mixes), x.shape[-1])
        arguments = (len(mixes), x, _addresses(mixes), _addresses(doutputs), dx, dmixes)
        _call("rwkv_mix_backward", x, FUSED_MULTIPLE, *arguments, starts=starts)
        return dx, None, *_summed(dmixes, ctx.needs_input_grad[2:])


class _NormMix(torch.autograd.Function):
    """Gradients of x and of the branch are one tensor: nothing writes into either."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, starts: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        *mixes, weight, bias = parameters
        whole = x if branch is None else torch.empty_like(x)
        statistics = x.new_empty(2, x.shape[0] * x.shape[1], dtype=torch.float32)
        outputs = tuple(torch.empty_like(x) for _ in mixes)
        ctx.save_for_backward(whole, statistics, starts, *parameters)
        arguments = (len(mixes), _rows_in_block(x), x, branch, weight, bias, _addresses(mixes), whole, statistics)
        _call("rwkv_norm_mix_forward", x, FUSED_MULTIPLE, *arguments, _addresses(outputs), starts=starts)
        return whole, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor | None, *doutputs: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, statistics, starts, *parameters = ctx.saved_tensors
        *mixes, weight, bias = parameters
        dwhole = None if dwhole is None else aligned(dwhole)
        sent = [torch.zeros_like(whole) if g is None else aligned(g) for g in doutputs]
        rows = _rows_in_block(whole)
        dx, dparameters = torch.empty_like(whole), _partial(whole, len(parameters), whole.shape[-1], rows=rows)
        arguments = (len(mixes), rows, whole, statistics, weight, bias, _addresses(mixes), dwhole, _addresses(sent))
        _call("rwkv_norm_mix_backward", whole, FUSED_MULTIPLE, *arguments, dx, dparameters, starts=starts)
        grads = (dx, dx, None, *_summed(dparameters, ctx.needs_input_grad[3:]))
        return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True))


class _ShiftBlend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, x: Tensor, starts: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        mixes, constants = tensors[:count], tensors[count:]
        ctx.count = count
        ctx.save_for_backward(x, starts, *tensors)
        outputs = tuple(torch.empty_like(x) for _ in mixes)
        arguments = (x, _addresses(mixes), _addresses(constants), _addresses(outputs))
        _call("rwkv_shift_blend_forward", x, FUSED_MULTIPLE, *arguments, starts=starts)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        x, starts, *tensors = ctx.saved_tensors
        mixes, constants = tensors[: ctx.count], tensors[ctx.count :]
        doutputs = tuple(aligned(g) for g in doutputs)
        dx, *dmixes = (torch.empty_like(x) for _ in range(1 + len(mixes)))
        dconstants = _partial(x, len(constants), x.shape[-1])
        given = (x, _addresses(mixes), _addresses(constants), _addresses(doutputs))
        _call("rwkv_shift_blend_backward", x, FUSED_MULTIPLE, *given, dx, _addresses(dmixes), dconstants, starts=starts)
        return None, dx, None, *dmixes, *_summed(dconstants, ctx.needs_input_grad[3 + ctx.count :])


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        y = torch.empty_like(value)
        _call("rwkv_sigmoid_gate_forward", value, FUSED_MULTIPLE, gate, value, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        dgate, dvalue = torch.empty_like(gate), torch.empty_like(value)
        _call("rwkv_sigmoid_gate_backward", value, FUSED_MULTIPLE, gate, value, aligned(dy), dgate, dvalue)
        return dgate, dvalue


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _call("rwkv_squared_relu_forward", x, FUSED_MULTIPLE, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _call("rwkv_squared_relu_backward", x, FUSED_MULTIPLE, x, aligned(dy), dx)
        return dx


class _Prepare(torch.autograd.Function):
    """Returns r, v and v_first once for each later use, on the same memory, so that all their gradients come here."""

    @staticmethod
    def forward(
        ctx: Any,
        size: int,
        r: Tensor,
        k: Tensor,
        a: Tensor,
        v: Tensor,
        v_first: Tensor | None,
        v_mix: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        inputs = (r, k, a, v, v_first, v_mix, *parameters)
        ctx.size = size
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        written, removed, replaced = (torch.empty_like(k) for _ in range(3))
        mixed = v if v_first is None else torch.empty_like(v)
        bonus = _bonus_like(k, size)
        outputs = (written, removed, replaced, None if v_first is None else mixed, bonus)
        _call("rwkv_prepare_forward", k, size, _addresses(inputs), _addresses(outputs))
        later = v.detach() if v_first is None else v_first
        return r, written, removed, replaced, mixed, mixed.detach(), later, bonus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *doutputs: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        tensors, parameters, k = inputs[:6], [p for p in inputs[6:] if p is not None], inputs[1]
        *of_io, of_v_first, dbonus = (None if g is None else aligned(g) for g in doutputs)
        of_io = [torch.zeros_like(k) if g is None else g for g in of_io]
        if dbonus is None:
            dbonus = _bonus_like(k, ctx.size).zero_()
        dinputs = [None if x is None else torch.empty_like(x) for x in tensors]
        dparameters = _partial(k, len(parameters), k.shape[-1])
        given = _addresses((*of_io, of_v_first, dbonus))
        _call("rwkv_prepare_backward", k, ctx.size, _addresses(inputs), given, _addresses((*dinputs, dparameters)))
        summed = _summed(dparameters, ctx.needs_input_grad[7:])
        return None, *dinputs, *summed, *[None] * (len(inputs) - 6 - len(summed))


def _bonus_like(k: Tensor, size: int) -> Tensor:
    """Uninitialised fp32 [B,T,H] beside k [B,T,C]."""
    return k.new_empty(*k.shape[:-1], k.shape[-1] // size, dtype=torch.float32)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # y, v, bonus, gate, weight, bias
        return _head_norm_forward("rwkv_read", ctx, inputs, inputs[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _head_norm_backward("rwkv_read", ctx, dout, 2)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # y, gate, weight, bias
        return _head_norm_forward("rwkv_gated_norm", ctx, inputs, inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _head_norm_backward("rwkv_gated_norm", ctx, dout, 2)


def _head_norm_forward(name: str, ctx: Any, inputs: Sequence[Tensor], gate: Tensor) -> Tensor:
    """Result, like gate [B,T,C], of a pass over y [B,T,H,N], the first of `inputs`; all are kept for backward."""
    ctx.save_for_backward(*inputs)
    out = torch.empty_like(gate)
    _call(f"{name}_forward", out, inputs[0].shape[-1], *inputs, out)
    return out


def _head_norm_backward(name: str, ctx: Any, dout: Tensor, n_parameters: int) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs that `_head_norm_forward` kept, of which the last are parameters."""
    inputs = ctx.saved_tensors
    dout = aligned(dout)
    grads = [torch.empty_like(x) for x in inputs[:-n_parameters]]
    parameters = _partial(dout, n_parameters, dout.shape[-1])
    _call(f"{name}_backward", dout, inputs[0].shape[-1], *inputs, dout, *grads, parameters)
    return *grads, *_summed(parameters, ctx.needs_input_grad[-n_parameters:])


def _like(x: Tensor, other: Tensor) -> Tensor:
    """The other tensor as the library reads it beside x, of whose dtype it takes every one to be."""
    return aligned(other if other.dtype == x.dtype else other.to(x.dtype))


def _parameters(*given: Tensor | None) -> list[Tensor | None]:
    """Parameters of C elements flat and in fp32, as the libraries read them, which round them to the dtype of x.

    Those that ZeRO keeps in bf16 or fp16 are made fp32 in one operation.
    """
    flat = [p.flatten() for p in given if p is not None]
    if any(p.dtype != torch.float32 for p in flat):
        flat = list(torch.stack(flat).float())
    read = (aligned(p) for p in flat)
    return [None if p is None else next(read) for p in given]


def _summed(partial: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of parameters from their partial sums [blocks,parameter,C]; None of each where none is `needed`."""
    return partial.sum(0).unbind() if any(needed) else (None,) * partial.shape[1]


def _rows_in_block(x: Tensor) -> int:
    """Rows of x [B,T,C] that norm_mix adds up at a time: fewer on a GPU where it would have too few blocks."""
    if not x.is_cuda:
        return ROWS_IN_BLOCK
    wanted = x.shape[0] * x.shape[1] // BLOCKS_OF_A_GPU
    return max(FEWEST_ROWS_IN_BLOCK, min(ROWS_IN_BLOCK, 1 << wanted.bit_length() >> 1))


def _partial(x: Tensor, *shape: int, rows: int = ROWS_IN_BLOCK) -> Tensor:
    """Uninitialised sums by block of `rows` rows of x [B,T,C]."""
    return x.new_empty((x.shape[0] * x.shape[1] + rows - 1) // rows, *shape, dtype=torch.float32)


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    """An array, or a structure, of pointers to the tensors; null for None."""
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def _call(name: str, x: Tensor, size: int, *arguments: Any, starts: Tensor | None = None) -> None:
    """Run a library's function for rows like those of x [B,T,C]; tensors are passed by their addresses."""
    library = find_library(x.device)
    assert isinstance(library, loader.Library)  # `serves` has asked
    batch, time, width = x.shape
    begins = None if starts is None else starts.data_ptr()
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    shape = Rows(batch * time, time, width, size, IO[x.dtype], torch.get_num_threads(), stream, begins)
    passed = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.cuda.device_of(x):
        status = getattr(library.handle, name)(ctypes.byref(shape), *passed)
    library.check(name, status, f"{x.dtype} {tuple(x.shape)} on {x.device}")
