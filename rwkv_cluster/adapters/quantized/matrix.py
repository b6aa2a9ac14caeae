"""A frozen matrix in fewer bits, and its product, which never keeps the matrix itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_cluster.adapters.quantized.table import QUANTIZATIONS
from rwkv_cluster.model.layers import linear
from rwkv_cluster.runtime.terminal.time_left import bytes_left


class QuantizedMatrix(NamedTuple):
    """Codes and scales of a matrix [out,in], as `quantize` of its kind gives them; kind: a key of QUANTIZATIONS."""

    codes: Tensor
    absmax: Tensor
    kind: str
    shape: tuple[int, int]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out,in] that the codes stand for."""
        matrix: Tensor = QUANTIZATIONS[self.kind].functions().dequantize(self.codes, self.absmax, self.shape, dtype)
        return matrix


FrozenMatrix = Tensor | QuantizedMatrix


def frozen_linear(x: Tensor, weight: FrozenMatrix) -> Tensor:
    """x [..., in] times a frozen matrix [out, in] transposed, in x's dtype."""
    if isinstance(weight, Tensor):
        return linear(x, weight)
    product: Tensor = _QuantizedLinear.apply(x, weight.codes, weight.absmax, weight.kind, weight.shape)
    return product


def whole(weight: FrozenMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix: itself, in its own dtype, or in `dtype` where it is quantised."""
    return weight if isinstance(weight, Tensor) else weight.whole(dtype)


class _QuantizedLinear(torch.autograd.Function):
    """The matrix exists while its product is computed: once forward, and once more backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
        ctx.kind, ctx.shape = kind, shape
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(codes, absmax)
        return linear(x, QuantizedMatrix(codes, absmax, kind, shape).whole(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, absmax = ctx.saved_tensors
        matrix = QuantizedMatrix(codes, absmax, ctx.kind, ctx.shape).whole(grad.dtype)
        return linear(grad, matrix.t()), None, None, None, None


class QuantizedLinear(nn.Module):
    """A frozen Linear in fewer bits. Its codes and scales are parameters, which DDP and ZeRO give to all ranks."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.kind, self.shape = kind, (n_out, n_in)
        codes, absmax = QUANTIZATIONS[kind].functions().quantize(weight.detach())
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)

    @property
    def matrix(self) -> QuantizedMatrix:
        """What it multiplies with."""
        return QuantizedMatrix(self.codes, self.absmax, self.kind, self.shape)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return frozen_linear(x, self.matrix)


def quantize_linears(model: nn.Module, names: Iterable[str], kind: str) -> None:
    """Put a QuantizedLinear in place of each Linear of `model` that `names` has, such as `blocks.0.att.key`."""
    names = list(names)
    with bytes_left(f"{kind} of the base", sum(model.get_parameter(f"{name}.weight").nbytes for name in names)) as left:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            weight = model.get_parameter(f"{name}.weight")
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight, kind))
            left.advance(weight.nbytes)
