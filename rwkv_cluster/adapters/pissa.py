"""PiSSA: LoRA that begins with the principal singular vectors: Meng, Wang and Zhang, 2024.

The paper trains A and B from s B A = the r largest singular values of W, beside the residual W - s B' A', where A' and
B' are their first values. Here W stays as it is and y = W x + s (B A - B' A') x, which is the same, and LoRA of rank
2 r with [A; A'] and [B, -B']: the base needs no rounding anew, and the adapter fits it as it was published. The first
values are rounded to W's dtype, in which A' and B' are kept, so that they are the same in any precision.

W [out,in], A, A' [r,in], B, B' [out,r]; s = alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_cluster.adapters import lora
from rwkv_cluster.adapters.peft_adapter import PeftAdapter
from rwkv_cluster.adapters.quantized.matrix import FrozenMatrix
from rwkv_cluster.config import AdapterConfig

OVERSAMPLES = 8
ITERATIONS = 8
"""Of the randomised decomposition: an exact one of a 4096 x 16384 matrix takes minutes."""


def initial(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A and B from the r largest singular values of W, each with its square root, and the same once more, to keep."""
    left, values, right = _largest(weight.to(torch.promote_types(weight.dtype, torch.float32)), rank, generator)
    root = (values / scale).sqrt()
    A, B = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    A[: len(root)], B[:, : len(root)] = root.unsqueeze(-1) * right, left * root
    A, B = A.to(weight.dtype), B.to(weight.dtype)
    return {"lora_A": A, "lora_B": B, "first_A": A.clone(), "first_B": B.clone()}


def product(x: Tensor, dropped: Tensor, weight: FrozenMatrix, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W x + s (B A - B' A') x' of x [...,in]; dropped: x', x after dropout. In x's dtype."""
    return lora.product(x, dropped, weight, as_lora(parts), scale)


def merged(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W + s (B A - B' A'), in weight's dtype."""
    return lora.merged(weight, as_lora(parts), scale)


def in_peft(parts: Mapping[str, Tensor], adapter: AdapterConfig) -> PeftAdapter:
    """The LoRA of rank 2 r under peft's names: it belongs to W as it is, not to peft's residual."""
    return lora.in_peft(as_lora(parts), adapter)


def as_lora(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of rank 2 r that is the same update."""
    A = torch.cat([parts["lora_A"], parts["first_A"]])
    B = torch.cat([parts["lora_B"], -parts["first_B"]], dim=1)
    return {"lora_A": A, "lora_B": B}


def _largest(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U [out,r], S [r], V^T [r,in] of the largest singular values.

    Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithms 4.4 and 5.1.
    """
    width = min(rank + OVERSAMPLES, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device, matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q  # [out,width]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
