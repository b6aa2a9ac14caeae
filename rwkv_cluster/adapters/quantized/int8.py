"""int8 with a scale for each row, as LLM.int8() has weights: Dettmers et al., "LLM.int8()", 2022, section 2.1.

w = code / 127 * absmax, where absmax is the largest |w| of the row. Here activations stay as they are, and there are no
outlier columns. The scale is an element of the row, so it has the row's dtype without a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""In fp32 at a time."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out,in] -> codes int8 [out,in], absmax [out] in weight's dtype."""
    absmax = weight.abs().amax(1)
    factor = LARGEST / absmax.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for rows in _chunks(weight):
        codes[rows] = torch.round(weight[rows].float() * factor[rows].unsqueeze(1)).to(torch.int8)
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix [out,in] in `dtype`; computed in fp32 and rounded once."""
    weight = torch.empty(shape, dtype=dtype, device=codes.device)
    step = absmax.float() / LARGEST
    for rows in _chunks(codes):
        weight[rows] = codes[rows].float() * step[rows].unsqueeze(1)
    return weight


def _chunks(matrix: Tensor) -> list[slice]:
    """Rows of ELEMENTS elements in all."""
    n_rows = max(1, ELEMENTS["cuda" if matrix.is_cuda else "cpu"] // matrix.shape[1])
    return [slice(start, start + n_rows) for start in range(0, matrix.shape[0], n_rows)]
