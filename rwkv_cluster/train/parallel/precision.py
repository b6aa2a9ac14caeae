"""The activation precisions, the torch types they stand for, and how a GPU adds up in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Let no GPU add partial sums of a matrix product in bf16 or fp16, as torch allows by default.

    A weight's gradient is a sum over all tokens of a micro batch, which cuBLAS may cut up: rounded in between, it would
    depend on how. Afterwards the process has its own setting again.
    """
    products = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(products, name) for name in names}
    try:
        for name in names:
            setattr(products, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(products, name, value)
