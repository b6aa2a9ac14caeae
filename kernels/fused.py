"""What a block computes beside its matrix products and WKV, one pass over memory each: compiled, and in plain PyTorch.

The plain forms are the definition. The compiled ones (csrc/fused.h) run on a CPU, in float32, bfloat16 and float16, for
widths and head sizes that are multiples of 16, with fp32 arithmetic. `serves` tells which one an input gets. Gradients
of parameters are summed over fixed blocks of rows in a fixed order: no number of threads changes them.

Legend: B batch, T time, H heads, N head size, C = H N, R = B T.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.native import IO
from rwkv_cluster.kernels.signatures import Rows

CHOICES = ("auto", "plain", "native")
"""Accepted values of `fused`. auto: native where it serves."""

KAPPA_EPS = 1e-12
HEAD_NORM_EPS = 64e-5  # RWKV-LM: 1e-5 on y / 8, which is 64e-5 on y
ROWS_IN_BLOCK = 64
MULTIPLE = 16


def serves(choice: str, x: Tensor, size: int) -> bool:
    """Whether the compiled form takes x [.., C] with head size `size`.

    Raises:
        KernelError: choice is "native" and there is no library.
    """
    if choice == "plain":
        return False
    require(choice)
    found = _library()
    fits = x.device.type == "cpu" and x.dtype in IO and x.shape[-1] % MULTIPLE == 0 and size % MULTIPLE == 0
    return fits and isinstance(found, loader.Library) and not torch.compiler.is_compiling()


def require(choice: str) -> None:
    """Raise KernelError for the choice "native" where there is no library."""
    found = _library()
    if choice == "native" and isinstance(found, loader.Missing):
        raise KernelError(f'{found.reason} training.fused "native" needs them; "auto" takes what there is.')


def mix(x: Tensor, mixes: Sequence[Tensor], size: int, *, choice: str = "auto") -> tuple[Tensor, ...]:
    """Token shift: x + (x one step earlier - x) * m for each m of `mixes`; zeros come before a sequence.

    Args:
        x: [B,T,C].
        mixes: 1 to 6 parameters of C elements.
        size: N, for `serves`.
        choice: one of CHOICES.
    """
    if serves(choice, x, size):
        result: tuple[Tensor, ...] = _Mix.apply(x.contiguous(), torch.stack([_parameter(m, x) for m in mixes]))
        return result
    delta = F.pad(x, (0, 0, 1, -1)) - x
    return tuple(torch.addcmul(x, delta, m.to(x.dtype)) for m in mixes)


def keys(
    k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, size: int, *, choice: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-7's key preparation: k (1 + (a - 1) k_a), -kappa, kappa a, with kappa the per-head unit vector along k k_k.

    k, a: [B,T,C]; k_k, k_a: C elements. All results [B,T,C].
    """
    if serves(choice, k, size):
        parameters = _parameter(k_k, k), _parameter(k_a, k)
        result: tuple[Tensor, Tensor, Tensor] = _Keys.apply(k.contiguous(), a.contiguous(), *parameters, size)
        return result
    q = (k * k_k.to(k.dtype)).unflatten(-1, (-1, size))
    accurate = torch.promote_types(q.dtype, torch.float32)
    kappa = F.normalize(q.to(accurate), dim=-1, eps=KAPPA_EPS).to(k.dtype).flatten(-2)
    written = k * torch.addcmul(1 - k_a.to(k.dtype), a, k_a.to(k.dtype))
    return written, -kappa, kappa * a


def read(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    choice: str = "auto",
) -> Tensor:
    """RWKV-7's reading of WKV's output: (head norm of y, with weight and bias, + (r . (k r_k)) v) * gate.

    y, r, k, v: [B,T,H,N]; gate [B,T,C]; r_k [H,N]; weight, bias [C]. Returns [B,T,C].
    """
    if serves(choice, gate, y.shape[-1]):
        tensors = (x.contiguous() for x in (y, r, k, v, gate))
        result: Tensor = _Read.apply(*tensors, *(_parameter(p, gate) for p in (r_k, weight, bias)))
        return result
    normed = F.layer_norm(y, y.shape[-1:], eps=HEAD_NORM_EPS).flatten(-2)  # [B,T,C]
    z = torch.addcmul(bias.to(y.dtype), normed, weight.to(y.dtype))
    accurate = torch.promote_types(r.dtype, torch.float32)
    bonus = (r * k * r_k.to(r.dtype)).sum(-1, keepdim=True, dtype=accurate)  # [B,T,H,1]
    return torch.addcmul(z.unflatten(-1, r_k.shape), bonus.to(z.dtype), v).flatten(-2) * gate


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, mixes)
        outputs = tuple(torch.empty_like(x) for _ in mixes)
        _call("rwkv_mix_forward", x, MULTIPLE, len(mixes), x, mixes, _addresses(outputs))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor, Tensor]:
        x, mixes = ctx.saved_tensors
        doutputs = tuple(g.contiguous() for g in doutputs)
        dx, dmixes = torch.empty_like(x), _partial(x, *mixes.shape)
        _call("rwkv_mix_backward", x, MULTIPLE, len(mixes), x, mixes, _addresses(doutputs), dx, dmixes)
        return dx, dmixes.sum(0)


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(k, a, k_k, k_a)
        ctx.size = size
        outputs = torch.empty_like(k), torch.empty_like(k), torch.empty_like(k)
        _call("rwkv_keys_forward", k, size, k, a, k_k, k_a, *outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        k, a, k_k, k_a = ctx.saved_tensors
        grads = torch.empty_like(k), torch.empty_like(a), _partial(k, len(k_k)), _partial(k, len(k_a))
        given = (g.contiguous() for g in doutputs)
        _call("rwkv_keys_backward", k, ctx.size, k, a, k_k, k_a, *given, *grads)
        return *grads[:2], grads[2].sum(0), grads[3].sum(0), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # y, r, k, v, gate, r_k, weight, bias
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[4])
        _call("rwkv_read_forward", out, inputs[0].shape[-1], *inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        dout = dout.contiguous()
        grads = [torch.empty_like(x) for x in inputs[:5]]
        parameters = _partial(dout, 3, dout.shape[-1])
        _call("rwkv_read_backward", dout, inputs[0].shape[-1], *inputs, dout, *grads, parameters)
        return *grads, *parameters.sum(0).unbind()


def _library() -> loader.Library | loader.Missing:
    return loader.cpu()


def _parameter(p: Tensor, x: Tensor) -> Tensor:
    """p as the plain form uses it beside x, rounded to x's dtype; flat and in float32, as the library reads it."""
    return p.flatten().to(x.dtype).float()


def _partial(x: Tensor, *shape: int) -> Tensor:
    """Uninitialised sums by block of rows of x [B,T,C]."""
    rows = x.shape[0] * x.shape[1]
    return x.new_empty((rows + ROWS_IN_BLOCK - 1) // ROWS_IN_BLOCK, *shape, dtype=torch.float32)


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _call(name: str, x: Tensor, size: int, *arguments: Any) -> None:
    """Run a library's function for rows like those of x [B,T,C]; tensors are passed by their addresses."""
    library = _library()
    assert isinstance(library, loader.Library)  # `serves` has asked
    batch, time, width = x.shape
    shape = Rows(batch * time, time, width, size, IO[x.dtype], torch.get_num_threads())
    passed = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    status = getattr(library.handle, name)(ctypes.byref(shape), *passed)
    if status:
        reason = library.handle.rwkv_status_text(status).decode()
        raise KernelError(f"{name} of {library.path} failed for {x.dtype} {tuple(x.shape)}: {reason}")
