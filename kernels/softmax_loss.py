"""Softmax cross entropy of a chunk of logits with its gradient, in one pass of the CUDA library (csrc/loss.h).

The gradient takes the logits' place: neither probabilities nor a gradient in fp32 exist beside them. Legend: m rows,
V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.native import IO, find_library
from rwkv_cluster.kernels.signatures import Logits


def library_for(hidden: Tensor) -> loader.Library | None:
    """The library whose kernel takes logits on hidden's device and in its dtype; None where only PyTorch does."""
    if not hidden.is_cuda or hidden.dtype not in IO:
        return None
    library = find_library(hidden.device)
    return library if isinstance(library, loader.Library) else None


def softmax_loss(library: loader.Library, logits: Tensor, targets: Tensor, l2wrap: float, *, gradient: bool) -> Tensor:
    """Summed cross entropy, a scalar in fp32, of softmax(logits) against `targets`.

    The order of the sum is fixed. A target outside the vocabulary gives NaN.

    Args:
        logits: [m,V] in float32, bfloat16 or float16, elements of a row beside each other. With `gradient` they are
            replaced by the gradient of the sum, rounded once; L2Wrap is in it, see `model.loss.head_loss`.
        targets: [m], integers.

    Raises:
        KernelError: the library reports an error.
    """
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    targets = targets.long().contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    shape = Logits(
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        stride=logits.stride(0),
        io=IO[logits.dtype],
        gradient=gradient,
        l2wrap=l2wrap,
        stream=torch.cuda.current_stream(logits.device).cuda_stream if logits.is_cuda else None,
    )
    with torch.cuda.device_of(logits):
        status = library.handle.rwkv_softmax_loss(
            ctypes.byref(shape), logits.data_ptr(), targets.data_ptr(), losses.data_ptr()
        )
    library.check("rwkv_softmax_loss", status, f"{logits.dtype} {tuple(logits.shape)} on {logits.device}")
    return losses.sum()
