"""NF4, 4-bit NormalFloat: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E.

w = value[code] * absmax, where absmax is the largest |w| of 64 elements one after the other. Two codes are a byte, the
first in its upper half: bytes and scales are bitsandbytes' own. The scale is an element of the block, so it has the
block's dtype without a loss; it is not quantised once more (QLoRA's double quantisation).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_cluster.adapters.quantized.table import BLOCK

log = logging.getLogger("rwkv_cluster")

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, scaled to 1; published in the paper."""

BLOCKS = {"cpu": 1 << 14, "cuda": 1 << 18}
"""In fp32 at a time."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out,in] -> codes uint8 [blocks * 32], absmax [blocks] in weight's dtype. Zeros fill the last block."""
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    factor = 1 / absmax.float().clamp_min(torch.finfo(torch.float32).tiny)
    values = torch.tensor(VALUES, device=weight.device)
    bounds = (values[:-1] + values[1:]) / 2  # the nearest value is chosen
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
    for part in _chunks(blocks):
        chosen = torch.bucketize(blocks[part].float() * factor[part].unsqueeze(1), bounds, out_int32=True)
        codes[part] = (chosen[:, ::2] * 16 + chosen[:, 1::2]).to(torch.uint8)
    return codes.flatten(), absmax


def dequantize(codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix [out,in] in `dtype`; computed in fp32 and rounded once. On a GPU by bitsandbytes where it works."""
    if codes.is_cuda and math.prod(shape) % BLOCK == 0 and _bitsandbytes_works(codes.device):
        return by_bitsandbytes(codes, absmax, shape, dtype)
    pairs = _pairs(codes.device)
    packed, scales = codes.view(-1, BLOCK // 2), absmax.float().unsqueeze(1)
    blocks = torch.empty(len(packed), BLOCK, dtype=dtype, device=codes.device)
    for part in _chunks(packed):
        blocks[part] = F.embedding(packed[part].int(), pairs).view(-1, BLOCK).mul_(scales[part])
    return blocks.flatten()[: math.prod(shape)].view(shape)


def by_bitsandbytes(codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix [out,in] by one kernel of bitsandbytes. The number of elements is a multiple of BLOCK."""
    functional = importlib.import_module("bitsandbytes.functional")
    state = functional.QuantState(absmax.float(), shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    weight: Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
    return weight


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte [256,2]."""
    values = torch.tensor(VALUES, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


@cache
def _bitsandbytes_works(device: torch.device) -> bool:
    """Whether it is installed and dequantises a block on `device`. A line says why where it is there and does not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    codes = torch.zeros(BLOCK // 2, dtype=torch.uint8, device=device)
    try:
        by_bitsandbytes(codes, torch.ones(1, device=device), (1, BLOCK), torch.float32)
    except Exception as error:  # its import and its calls raise whatever loading its CUDA library has raised
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        log.warning("nf4 is dequantised in PyTorch, which is slower: bitsandbytes does not work here: %s", cause)
        return False
    return True


def _chunks(blocks: Tensor) -> list[slice]:
    n_blocks = BLOCKS["cuda" if blocks.is_cuda else "cpu"]
    return [slice(start, start + n_blocks) for start in range(0, len(blocks), n_blocks)]
