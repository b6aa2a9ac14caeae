"""The head and the loss in one: cross entropy plus RWKV-LM's L2Wrap, a chunk of rows at a time.

Logits exist for `chunk_rows` rows at a time: both gradients are formed in the forward pass, so that nothing of size
(M, V) outlives its chunk. What it costs: the head's weight gradient [V, C] in fp32 from forward to backward. With the
CUDA library the logits' gradient is written in their place, in one pass of `kernels.softmax_loss`; elsewhere PyTorch
forms it in a buffer of probabilities in fp32, which is the reference.

M rows (B * T), C width, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_cluster.kernels import softmax_loss
from rwkv_cluster.kernels.sizes import LOGITS_IN_FLIGHT
from rwkv_cluster.model.layers import LowPrecisionCopy, linear
from rwkv_cluster.model.rwkv import RWKV


def next_token_loss(model: RWKV, batch: Tensor, l2wrap: float = 0.0) -> Tensor:
    """`head_loss` of predicting each next token of batch [b, T + 1] int64."""
    return target_loss(model, batch[:, :-1], batch[:, 1:], l2wrap)


def target_loss(
    model: RWKV,
    inputs: Tensor,
    targets: Tensor,
    l2wrap: float = 0.0,
    *,
    starts: Tensor | None = None,
    trained: Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    """`head_loss` of predicting targets [b,T] int64 after inputs [b,T].

    Head and softmax are computed where the model is trained alone, so that the other rows have a gradient of exactly 0.

    Args:
        starts: [b,T] bool, where the state is empty before a position; see `RWKV.hidden`.
        trained: int64 indices into the b * T targets; None: all. Without any the loss is 0 and has a graph.
        divisor: what the sum over the rows is divided by; by default their number.
    """
    hidden = model.hidden(inputs) if starts is None else model.hidden(inputs, starts=starts)
    rows, wanted = hidden.flatten(0, 1), targets.flatten()  # [b T, C], [b T]
    if trained is not None:
        rows, wanted = rows.index_select(0, trained), wanted.index_select(0, trained)
    return head_loss(rows, model.head.weight, wanted, l2wrap, divisor=divisor, kept=model.head.kept)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2wrap: float,
    chunk_rows: int | None = None,
    divisor: float | None = None,
    kept: LowPrecisionCopy | None = None,
) -> Tensor:
    """Mean cross entropy of softmax(hidden Wᵀ) against `targets`.

    The gradient also carries L2Wrap: at the largest logit m of a row (the first, in a tie) l2wrap * m / M is
    added, scaled like the rest by the upstream gradient. The reported value does not contain it.

    Args:
        hidden: [M, C], any float dtype; products run in it, softmax and loss in fp32 (float64 for float64).
        weight: [V, C], used in hidden's dtype.
        targets: int64 [M].
        l2wrap: weight of the extra gradient, 1e-4 in RWKV-LM; 0 for none.
        chunk_rows: rows at a time; by default as many as have 2**24 logits, on a GPU 2**28.
        divisor: of the sums over the rows in place of M.
        kept: the weight's copy in hidden's dtype, where one is kept.

    Returns:
        Scalar in fp32 (float64 for float64).
    """
    elements = LOGITS_IN_FLIGHT["cuda" if hidden.is_cuda else "cpu"]
    rows = chunk_rows or max(16, elements // weight.shape[0])
    if not torch.is_grad_enabled():  # which a Function cannot see: its needs_input_grad stays
        hidden, weight = hidden.detach(), weight.detach()
    divisor = max(hidden.shape[0], 1) if divisor is None else divisor
    values = weight.detach()
    values = values.to(hidden.dtype) if kept is None else kept.of(values, hidden.dtype)
    return _HeadLoss.apply(hidden, weight, values, targets, _How(l2wrap, rows, divisor))


class _How(NamedTuple):
    l2wrap: float
    chunk_rows: int
    divisor: float


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        values: Tensor,
        targets: Tensor,
        how: _How,
    ) -> Tensor:
        l2wrap, chunk_rows, divisor = how
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        needs_any = needs_hidden or needs_weight
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accurate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accurate) if needs_weight else None
        library = softmax_loss.library_for(hidden)
        for start in range(0, hidden.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = linear(hidden[part], values)  # [chunk, V]
            if library is not None:
                total += softmax_loss.softmax_loss(library, logits, targets[part], l2wrap, gradient=needs_any)
                grad_logits = logits
            else:
                loss, grad_logits = _softmax_loss(logits, targets[part], l2wrap, accurate)
                total += loss
            if not needs_any:
                continue
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = linear(grad_logits, values.t())
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.divisor, ctx.weight_dtype = divisor, weight.dtype
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad / ctx.divisor  # the mean's 1 / M comes last: in fp16 the gradients would vanish with it
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a [V,m] times b [m,C] to total [V,C] in place, on a GPU in the product's own fp32 sums where torch can.

    Else the product is rounded to the dtype of a and b first, and added in a pass of its own.
    """
    if a.is_cuda and a.dtype != total.dtype and _has_mixed_addmm(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += linear(a, b.t())


@cache
def _has_mixed_addmm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm on that GPU takes factors of `dtype`, bf16 or fp16, and an fp32 sum; waits for the device.

    It is tried, on 16 by 16 elements, because its signature does not say so: torch 2.8 and 2.9 have it and want the sum
    in the dtype of the factors (pytorch pull request 167931); below compute capability 8.0 there is no such product.
    """
    if torch.version.cuda is None or "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    factor = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones_like(factor, dtype=torch.float32)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return bool((total == 1 + len(factor)).all())


def _softmax_loss(logits: Tensor, targets: Tensor, l2wrap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of logits [m,V] and its gradient [m,V] by the logits, L2Wrap included."""
    target = targets.unsqueeze(-1)  # [m,1]
    largest, where = logits.max(dim=-1, keepdim=True)  # [m,1]; the first of equals
    largest = largest.to(dtype)
    probabilities = torch.softmax(logits, dim=-1, dtype=dtype)
    # the largest probability is 1 / sum(exp(logit - largest)), at least 1 / V: its logarithm never overflows
    log_sum = -probabilities.gather(-1, where).log()
    loss = (log_sum + largest - logits.gather(-1, target).to(dtype)).sum()
    probabilities.scatter_add_(-1, target, torch.full_like(largest, -1.0))
    if l2wrap:
        probabilities.scatter_add_(-1, where, l2wrap * largest)
    return loss, probabilities
