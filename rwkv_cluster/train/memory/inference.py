"""The precision of a model that is to be read and sampled, and not trained: fp32, or half of that where it has to be.

T tokens of a pass, C width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_cluster.kernels.sizes import LOGITS_IN_FLIGHT
from rwkv_cluster.train.memory.model_states import FP32

log = logging.getLogger("rwkv_cluster")

ALLOWANCE = 1.05, 1e9
"""Factor for the allocator's fragments, and bytes for cuBLAS, kernels and a matrix that an adapter is merged into.
Assumed."""
_ACTIVATIONS = 20
"""[T,C] tensors that a block has at a time without gradients: the channel mix's four wide ones twice. Assumed."""
_LOGITS = 2
"""Logits, and their fp32 copy or softmax, at a time."""
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def inference_dtype(
    weights: Mapping[str, Tensor], device: str, *, tokens: int, trained_in: torch.dtype = torch.float32
) -> torch.dtype:
    """Dtype of a model with `weights` on "cpu" or "cuda": fp32 where that fits the GPU's free memory, and on a CPU.

    Else that of the run, `trained_in`, or the weights' own where these are of 16 bits, if the GPU has it; else bf16, or
    fp16 on a GPU without bf16. A line says so. tokens: of a pass, T.
    """
    if device != "cuda":
        return torch.float32
    n_elements = sum(tensor.numel() for tensor in weights.values())
    n_rows, width = next(tensor.shape for name, tensor in weights.items() if name.endswith("emb.weight"))  # [V,C]
    logits = min(tokens * n_rows, LOGITS_IN_FLIGHT["cuda"])
    factor, fixed = ALLOWANCE
    needed = factor * FP32 * (n_elements + _ACTIVATIONS * tokens * width + _LOGITS * logits) + fixed
    free = _free_bytes()
    if needed <= free:
        return torch.float32
    dtype = _low_precision(weights, trained_in)
    log.info(
        "the model is in %s: in fp32 it is predicted to need %.1f GB, and the GPU has %.1f GB free",
        _NAMES[dtype],
        needed / 1e9,
        free / 1e9,
    )
    return dtype


def _free_bytes() -> int:
    """Memory of the current GPU that nobody has, or that torch keeps in this process for what comes next."""
    free, _ = torch.cuda.mem_get_info()
    return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _low_precision(weights: Mapping[str, Tensor], trained_in: torch.dtype) -> torch.dtype:
    stored_in = max(weights.values(), key=Tensor.numel).dtype  # a file may have its small tensors in fp32
    own = trained_in if trained_in in _NAMES else stored_in
    if own == torch.float16 or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
