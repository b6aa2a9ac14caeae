"""The WKV recurrences written a third time, index by index as RWKV-LM's kernels do it, and random inputs for them.

Slow and independent of `rwkv_cluster.kernels`: autograd over this in float64 is what the kernels are held to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

VERSIONS = ("wkv5", "wkv6", "wkv7")


def naive(version: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state for the arguments of the operator `version`, the state included."""
    return _naive7(*inputs) if version == "wkv7" else _naive6(*inputs)


def as_starts(rows: Sequence[Iterable[int]], time: int) -> Tensor:
    """Where documents begin, bool [B,T], from the steps of each row."""
    starts = torch.zeros(len(rows), time, dtype=torch.bool)
    for row, steps in enumerate(rows):
        starts[row, list(steps)] = True
    return starts


def each_document_alone(version: str, starts: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state of `naive` called once for each document, with a state only where a row goes on."""
    *tensors, state = inputs
    ys, finals = [], []
    for row, begins in enumerate(starts):
        inner = [step for step in begins.nonzero().flatten().tolist() if step]
        s = torch.zeros_like(state[:1]) if begins[0] else state[row : row + 1]
        parts = []
        for first, last in pairwise([0, *inner, starts.shape[1]]):
            document = [x[row : row + 1, first:last] if x.ndim == 4 else x for x in tensors]
            y, final = naive(version, *document, s)
            parts.append(y)
            s = torch.zeros_like(s)
        ys.append(torch.cat(parts, dim=1))
        finals.append(final)
    return torch.cat(ys), torch.cat(finals)


def random_inputs(version: str, batch: int, time: int, heads: int, size: int, *, seed: int = 0) -> list[Tensor]:
    """float64 arguments in the operator's order, the initial state last, with values as models have them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    full, state = (batch, time, heads, size), normal(batch, heads, size, size)
    if version == "wkv7":
        kappa = torch.nn.functional.normalize(normal(*full), dim=-1)
        erase = torch.sigmoid(normal(*full))
        return [normal(*full), 2 * normal(*full), normal(*full), normal(*full), -kappa, kappa * erase, state]
    w = normal(*(full if version == "wkv6" else (heads, size))) * 1.5 - 2
    return [normal(*full), normal(*full), normal(*full), w, normal(heads, size), state]


def output_gradients(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients to send into y and the final state, rounded so that every dtype can hold them."""
    generator = torch.Generator().manual_seed(99)
    r, state = inputs[0], inputs[-1]
    grads = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (r, state))
    return tuple(x.bfloat16().double() for x in grads)


def values_and_gradients(operator, inputs: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """y, final state, and the gradient of every input, all computed from inputs in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, state = operator(*leaves)
    dy, dstate = output_gradients(inputs)
    return [
        y.detach(),
        state.detach(),
        *torch.autograd.grad((y, state), leaves, (dy.to(y), dstate.to(state)), materialize_grads=True),
    ]


def relative_errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative L2 error of each tensor; infinite where something is not finite."""
    errors = []
    for x, y in zip(found, wanted, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)
        errors.append(float(error) if torch.isfinite(x).all() else math.inf)
    return errors


def _naive6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    s = state  # [B,H,key,value]
    ys = []
    for t in range(r.shape[1]):
        decay = torch.exp(-torch.exp(w if w.ndim == 2 else w[:, t]))
        kv = torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        ys.append(torch.einsum("bhi,bhij->bhj", r[:, t], s + u[:, :, None] * kv))
        s = s * decay[..., None] + kv
    return torch.stack(ys, 1), s


def _naive7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    s = state  # [B,H,value,key]
    decay = torch.exp(-torch.exp(-torch.nn.functional.softplus(-w) - 0.5))
    ys = []
    for t in range(r.shape[1]):
        transition = torch.diag_embed(decay[:, t]) + torch.einsum("bhi,bhj->bhij", a[:, t], b[:, t])
        s = s @ transition + torch.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        ys.append(torch.einsum("bhij,bhj->bhi", s, r[:, t]))
    return torch.stack(ys, 1), s
