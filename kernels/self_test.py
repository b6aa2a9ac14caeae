"""The backends of `ops` on small inputs beside the float64 reference: what `rwkv-cluster doctor` runs on a machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import ops, reference
from rwkv_cluster.kernels.sizes import CUDA_HEAD_SIZES

VERSIONS = ("wkv5", "wkv6", "wkv7")
LIMITS = {
    ("native", torch.bfloat16): 6e-3,
    ("exact", torch.bfloat16): 2.5e-3,
    ("fla", torch.bfloat16): 2e-2,
    ("fla", torch.float32): 5e-3,  # its products of fp32 are TF32, with 10 bits of mantissa where bf16 has 7
}
FLOAT32_LIMIT = 5e-5
TIME = 37  # more than two chunks, and a part of one
BEGINS = (5, 16, 17, 30)
"""Steps at which documents begin in the second of two trials: inside a chunk, at its edge, and of one step."""


def run(device: str) -> Iterator[tuple[str, torch.dtype, float, float]]:
    """Name, dtype, worst relative L2 error and allowed error of each backend that serves on `device`.

    The error is the worst of outputs, final states and gradients, over the three operators, with one document and
    with several in a row, and, of the compiled kernels on a GPU, over their head sizes.
    """
    for backend in ops.BACKENDS[1:]:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and (backend, dtype) not in LIMITS:
                continue
            try:
                ops.require(backend, torch.device(device), dtype, 64)
            except KernelError:
                continue
            sizes = CUDA_HEAD_SIZES if backend == "native" and device.startswith("cuda") else (64,)
            trials = itertools.product(VERSIONS, sizes, (None, _starts()))
            worst = max(_error(version, size, starts, backend, dtype, device) for version, size, starts in trials)
            yield backend, dtype, worst, LIMITS.get((backend, dtype), FLOAT32_LIMIT)


def inputs(version: str, batch: int, time: int, heads: int, size: int) -> list[Tensor]:
    """Random float64 arguments of an operator, the state last, with values as models have them."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    full, state = (batch, time, heads, size), normal(batch, heads, size, size)
    if version == "wkv7":
        kappa = torch.nn.functional.normalize(normal(*full), dim=-1)
        return [*(normal(*full) for _ in range(4)), -kappa, kappa * torch.sigmoid(normal(*full)), state]
    w = normal(*(full if version == "wkv6" else full[2:])) - 2
    return [*(normal(*full) for _ in range(3)), w, normal(heads, size), state]


def _starts() -> Tensor:
    """[1,T] bool, true where documents begin."""
    starts = torch.zeros(1, TIME, dtype=torch.bool)
    starts[0, list(BEGINS)] = True
    return starts


def _error(version: str, size: int, starts: Tensor | None, backend: str, dtype: torch.dtype, device: str) -> float:
    # [H,N] tensors stay float32: the gradients of so few numbers would show little but bf16's rounding
    *tensors, state = inputs(version, 1, TIME, 2, size)
    arguments = [*(x.to(dtype if x.ndim == 4 else torch.float32) for x in tensors), state.float()]
    on_device = None if starts is None else starts.to(device)
    by_reference = partial(getattr(reference, version), starts=starts)
    by_backend = partial(getattr(ops, version), starts=on_device, backend=backend)
    expected = _results(by_reference, [x.double() for x in arguments], "cpu")
    results = _results(by_backend, arguments, device)
    pairs = zip(results, expected, strict=True)
    return max(float((x.double().cpu() - y).norm() / y.norm()) for x, y in pairs)


def _results(operator: Callable[..., tuple[Tensor, Tensor]], arguments: list[Tensor], device: str) -> list[Tensor]:
    leaves = [x.to(device).requires_grad_() for x in arguments]
    y, state = operator(*leaves)
    generator = torch.Generator().manual_seed(8)
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, state)]
    return [y.detach(), state.detach(), *torch.autograd.grad((y, state), leaves, grads)]
