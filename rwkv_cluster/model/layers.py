"""Building blocks that the versions share: dense products, norms and the token shift.

Parameters may be fp32 masters while activations are bf16 or fp16: every layer uses its weights in the dtype
of its input (`weight.to(x.dtype)`, free when equal), which equals training on a low-precision copy that is
refreshed from the masters after each step. Statistics of the norms are computed in fp32.

Shapes: B batch, T time, C width, A attention width, H heads, N head size (A = H * N), M = B * T rows.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from rwkv_cluster.kernels.documents import Documents, Starts, flags
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.kernels.fused.reference import layer_norm, without_others


def uninitialized(*shape: int) -> nn.Parameter:
    """Parameter full of NaN, so that a model used before `initialize` or a load fails loudly."""
    return nn.Parameter(torch.full(shape, float("nan")))


IS_X86 = platform.machine() in ("x86_64", "AMD64")


@cache
def _has_fast_onednn() -> bool:
    """Whether oneDNN's fp32 products are the ones to take: they use AVX-512 on every processor that has it."""
    has_avx512 = IS_X86 and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return has_avx512 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _has_half_units() -> bool:
    """Whether bf16 and fp16 products may be left to PyTorch: on anything but an x86 known to have no units for them."""
    asked = [getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("avx512_bf16", "amx_tile")]
    return not IS_X86 or any(ask is None or ask() for ask in asked)


def _goes_through_fp32(x: Tensor) -> bool:
    """Whether `_Fp32Linear` beats PyTorch at x's products."""
    if x.device.type != "cpu" or x.numel() < 16 * x.shape[-1]:  # for a few rows the set-up costs more than it saves
        return False
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return (is_half and not _has_half_units()) or (x.dtype == torch.float32 and _has_fast_onednn())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in fp32: x [..., in], weight [out, in], bias [out]."""
    if _has_fast_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Fp32Linear(torch.autograd.Function):
    """x Wᵀ + b on a CPU by fp32 products.

    For fp32 with AVX-512: PyTorch asks MKL, which on AMD processors does without, 95 against oneDNN's 190 GFLOP/s
    on one Zen 5 core (without AVX-512, MKL is a tenth faster on Zen 3).
    For bf16 and fp16 without units for them: the operands are exact in fp32 and only the result is rounded, 8 times
    faster than PyTorch's emulation on one Zen 3 core. What backward needs is kept in the dtype it came in.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _has_fast_onednn():  # it takes any strides, but for most it has only a reference loop: 100 times slower
            x = x.contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad  # of a frozen weight, x is not kept
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # [..., in], [out, in]
        rows = grad.contiguous().view(-1, grad.shape[-1]).float()  # [M, out]
        grad_x = grad_weight = grad_bias = None
        if weight is not None:
            grad_x = _product(rows, weight.float().t()).view(*grad.shape[:-1], weight.shape[1]).to(grad.dtype)
        if x is not None:
            inputs = x.reshape(-1, x.shape[-1])  # [M, in]
            grad_weight = _product(rows.t(), inputs.float().t()).to(grad.dtype)  # [out, in]
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(grad.dtype)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return _Fp32Linear.apply(x, weight, bias) if _goes_through_fp32(x) else F.linear(x, weight, bias)


class _LinearAndDown(torch.autograd.Function):
    """x Wᵀ and x D of one x, whose gradient's second part is added by the product that computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        needs_x, *needs_matrices = ctx.needs_input_grad
        ctx.save_for_backward(x if any(needs_matrices) else None, *((weight, down) if needs_x else (None, None)))
        return F.linear(x, weight), F.linear(x, down.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_hidden: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, down = ctx.saved_tensors  # [..., in], [out, in], [in, rank]
        rows, hidden_rows = grad.flatten(0, -2), grad_hidden.flatten(0, -2)  # [M, out], [M, rank]
        grad_x = grad_weight = grad_down = None
        if weight is not None:
            grad_x = rows @ weight
            torch.addmm(grad_x, hidden_rows, down.t(), out=grad_x)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        _, needs_weight, needs_down = ctx.needs_input_grad
        if needs_weight:
            grad_weight = rows.t() @ x.flatten(0, -2)
        if needs_down:
            grad_down = x.flatten(0, -2).t() @ hidden_rows
        return grad_x, grad_weight, grad_down


def linear_and_down(x: Tensor, weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., in] times weight [out, in] transposed, and times down [in, rank]: [..., out], [..., rank]."""
    if _goes_through_fp32(x):
        return linear(x, weight), linear(x, down.t())
    result: tuple[Tensor, Tensor] = _LinearAndDown.apply(x, weight.to(x.dtype), down.to(x.dtype))
    return result


class _TanhLinear(torch.autograd.Function):
    """tanh(z) U + b, whose gradients of U and b are one product, for beside tanh(z) there are columns of ones."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        rows, rank = z.flatten(0, -2), z.shape[-1]  # [M, rank]
        needs_z, *needs_parameters = ctx.needs_input_grad
        kept = rows.new_empty(len(rows), rank + (COLUMNS_OF_ONES if any(needs_parameters) else 0))
        hidden = torch.tanh(rows, out=kept[:, :rank])
        kept[:, rank:] = 1.0
        ctx.save_for_backward(kept, up if needs_z else None)
        ctx.rank = rank
        return torch.addmm(bias, hidden, up).view(*z.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kept, up = ctx.saved_tensors  # [M, rank + ones], [rank, out]
        rows = grad.flatten(0, -2)  # [M, out]
        grad_z = grad_up = grad_bias = None
        if up is not None:
            grad_z = torch.ops.aten.tanh_backward(rows @ up.t(), kept[:, : ctx.rank]).view(*grad.shape[:-1], -1)
        _, needs_up, needs_bias = ctx.needs_input_grad
        if needs_up or needs_bias:
            grads = kept.t() @ rows  # [rank + ones, out]
            grad_up, grad_bias = grads[: ctx.rank], grads[ctx.rank]
        return grad_z, grad_up if needs_up else None, grad_bias if needs_bias else None


COLUMNS_OF_ONES = 8
"""More than one, so that rows of bf16 stay multiples of the 16 bytes that a GPU's products read at once."""


def tanh_linear(z: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """tanh(z) U + b, the second half of a LoRA: z [..., rank], U `up` [rank, out], bias [out] -> [..., out]."""
    is_half = z.dtype in (torch.bfloat16, torch.float16)  # in fp32, products may be TF32's, and sums are not
    if not (is_half and torch.is_grad_enabled()) or _goes_through_fp32(z):
        return linear(torch.tanh(z), up.t(), bias)
    result: Tensor = _TanhLinear.apply(z, up.to(z.dtype), bias.to(z.dtype))
    return result


class LowPrecisionCopy:
    """A parameter's values in the dtype of activations, kept from one forward pass to the next.

    They are made anew wherever the parameter has been changed in place, or has been given other memory. Only torch's
    fused optimizers leave a parameter's version as it was: whoever lets one update it writes `values` anew himself.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self._source: tuple[StorageWeakRef, int] | None = None  # memory and version that they were made of

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, through which a gradient goes to `weight` as through `weight.to(dtype)`."""
        if weight.dtype == dtype:
            return weight
        source = _source_of(weight)
        if self.values is None or self.values.dtype != dtype or self._source != source:
            self.values, self._source = weight.detach().to(dtype), source
        return _Kept.apply(weight, self.values) if weight.requires_grad else self.values

    def refreshed(self, weight: Tensor) -> None:
        """Somebody has copied `weight`, as it is now, into `values`."""
        self._source = _source_of(weight)


class OwnMatrices(nn.Module):
    """A module that has matrices without a layer around them, as those of LoRAs, and copies of them by name.

    kept: none, where none are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, LowPrecisionCopy] = {}

    def matrix(self, name: str, x: Tensor) -> Tensor:
        """The parameter `name` in x's dtype: the copy that is kept, or one made now."""
        weight: Tensor = getattr(self, name)
        kept = self.kept.get(name)
        return weight.to(x.dtype) if kept is None else kept.of(weight, x.dtype)


def _source_of(weight: Tensor) -> tuple[StorageWeakRef, int]:
    """Whatever differs once the values of `weight` may: a freed storage's reference equals no later one's."""
    return StorageWeakRef(weight.untyped_storage()), weight._version


class _Kept(torch.autograd.Function):
    """weight.to(dtype) whose result, `values`, is there already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class Linear(nn.Module):
    """y = x Wᵀ without bias; weight [out, in]. With `down` [in, rank] also x `down`, see `linear_and_down`.

    kept: the weight's copy in x's dtype, where one is kept.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = uninitialized(n_out, n_in)
        self.kept: LowPrecisionCopy | None = None

    def forward(self, x: Tensor, down: Tensor | None = None) -> Any:  # [..., in] -> [..., out], or that and [..., rank]
        weight = self.weight if self.kept is None else self.kept.of(self.weight, x.dtype)
        return linear(x, weight) if down is None else linear_and_down(x, weight, down)


class Embedding(nn.Module):
    """Rows of weight [V, C] by token id."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = uninitialized(vocab_size, width)

    def forward(self, tokens: Tensor) -> Tensor:  # int [B, T] -> [B, T, C] in the weight's dtype
        return F.embedding(tokens, self.weight)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, with weight and bias [C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = uninitialized(width)
        self.bias = uninitialized(width)

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return layer_norm(x, self.weight, self.bias)


class FinalNorm(nn.Module):
    """Layer norm of the last residual sum, with weight and bias [C]. choice: the pass's form, e.g. "auto"."""

    def __init__(self, width: int, choice: str) -> None:
        super().__init__()
        self.weight = uninitialized(width)
        self.bias = uninitialized(width)
        self.choice = choice

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Norm of x + branch, [B,T,C]."""
        return fused.norm_mix(x, branch, self.weight, self.bias, (None,), choice=self.choice)[1]


class NormMix(nn.Module):
    """Layer norm at the beginning of a block's half, with the residual sum before it and the token shift after it.

    The half calls it, and not the block: ZeRO-3 gathers the mixes while the half runs. choice: the pass's form, "auto".
    """

    def __init__(self, width: int, choice: str) -> None:
        super().__init__()
        self.weight = uninitialized(width)
        self.bias = uninitialized(width)
        self.choice = choice

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        mixes: Sequence[Tensor | None],
        before: Tensor | None,
        starts: Starts | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x + branch [B,T,C], h + Δ ⊙ mix of its norm h for each [1,1,C] of `mixes`, h for None; and h's last [B,C].

        The last step is for a state, and None without `before` [B,C], that of the segment before. starts: bool [B,T].
        """
        if before is None:
            x, *mixed = fused.norm_mix(x, branch, self.weight, self.bias, mixes, flags(starts), choice=self.choice)
            return x, tuple(mixed), None
        x = x if branch is None else x + branch
        h = layer_norm(x, self.weight, self.bias)
        delta = shift_delta(h, before, starts)
        return x, tuple(h if m is None else torch.addcmul(h, delta, m.to(h.dtype)) for m in mixes), h[:, -1]


class HeadNorm(nn.Module):
    """Weight and bias [A] of RWKV-LM's `ln_x`, the norm of each head, in `fused.gated_readout` and `gated_norm`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = uninitialized(width)
        self.bias = uninitialized(width)


def complements(mixes: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """1 - m of each m [1,1,C], computed in `dtype`: at least fp32, so that the compiled passes read it as it is."""
    rest = 1 - torch.stack([m.flatten() for m in mixes]).to(dtype)
    return list(rest.to(torch.promote_types(dtype, torch.float32)))


def previous_tokens(x: Tensor, before: Tensor | None, starts: Starts | None = None) -> Tensor:
    """Token shift: x [B, T, C] one step later, with `before` [B, C] (zeros by default) as the first step.

    starts: bool [B, T], true where a document begins: zeros there. Or documents: `before` [D, C] of each there.
    """
    if before is None:
        return without_others(F.pad(x, (0, 0, 1, -1)), flags(starts))
    before = before.to(x.dtype)
    if isinstance(starts, Documents):
        return F.pad(x, (0, 0, 1, -1)).flatten(0, 1).index_copy(0, starts.first, before).view_as(x)
    return without_others(torch.cat([before.unsqueeze(1), x[:, :-1]], dim=1), starts)


def shift_delta(x: Tensor, before: Tensor | None, starts: Starts | None) -> Tensor:
    """Δ = σ(x) - x [B, T, C], what the token mixes of RWKV-6 and RWKV-7 interpolate along."""
    return previous_tokens(x, before, starts) - x
