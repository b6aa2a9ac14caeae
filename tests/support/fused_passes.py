"""Inputs of the fused passes, and their results and gradients in any form."""

from __future__ import annotations

import torch
from naive_wkv import relative_errors

from rwkv_cluster.kernels.fused import ops as fused

NATIVE = [
    *("mix", "norm_mix", "norm_mix_alone", "shift_blend", "squared_relu", "sigmoid_gate"),
    *("prepare", "prepare_block_0", "gated_readout", "gated_norm"),
]
"""Passes of both libraries. norm_mix_alone: no branch, no gradient of the sum, and the norm itself as a result."""
SHIFTED = ["mix", "norm_mix", "norm_mix_alone", "shift_blend"]
"""Those of them that read the row before."""
SHAPES = [(2, 1, 4, 16), (2, 7, 3, 16), (3, 50, 2, 64), (2, 65, 1, 32)]
"""B, T, H, N: less than a block of 64 rows, more than one, and sequences that do not begin with one."""

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative L2 of every result and gradient."""


def arguments(name: str, shape: tuple[int, int, int, int], count: int = 6) -> tuple[list[torch.Tensor], int]:
    """float64 tensors of an operator, its parameters last, and the number of those."""
    batch, time, heads, size = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=generator, dtype=torch.float64)

    flat, full, width = (batch, time, heads * size), shape, heads * size
    if name == "mix":
        return [normal(*flat), *(normal(1, 1, width) for _ in range(count))], count
    if name == "norm_mix":
        parameters = [normal(width), normal(width), *(normal(1, 1, width) for _ in range(count))]
        return [normal(*flat), normal(*flat), *parameters], count + 2
    if name == "norm_mix_alone":
        return [normal(*flat), normal(width), normal(width), normal(1, 1, width)], 3
    if name == "shift_blend":
        return [*(normal(*flat) for _ in range(6)), *(normal(1, 1, width) for _ in range(5))], 5
    if name in ("squared_relu", "sigmoid_gate"):
        return [normal(*flat) for _ in range(2 if name == "sigmoid_gate" else 1)], 0
    if name == "gated_norm":
        return [normal(*full), normal(*flat), normal(width), normal(width)], 2
    if name.startswith("prepare"):
        first = name == "prepare_block_0"
        tensors = [normal(*flat) for _ in range(4 if first else 6)]
        vectors = [normal(1, 1, width) for _ in range(3 if first else 4)]  # k_k, k_a, a0, v0
        return [*tensors, *vectors[:2], normal(heads, size), *vectors[2:]], len(vectors) + 1
    bonus = normal(batch, time, heads)
    return [normal(*full), normal(*flat), bonus, normal(*flat), normal(width), normal(width)], 2


def is_bonus(name: str, i: int) -> bool:
    """Whether argument i is the reading's bonus, which is fp32 beside bf16 and fp16."""
    return name == "gated_readout" and i == 2


def some_starts(batch: int, time: int) -> torch.Tensor:
    """Documents of a block of 64 rows: of 3 tokens, of one, and from its first row and its last."""
    in_block = torch.arange(batch * time).view(batch, time) % 64
    return (in_block % 3 == 0) | (in_block == 1)


def errors_of(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    documents: bool = False,
    count: int = 6,
    vanishing: int | None = None,
) -> list[float]:
    """Relative errors of the native form's results and gradients for inputs of `dtype`, beside the plain in float64.

    documents: with `some_starts`. count: of mixes. vanishing: of this tensor the second step is zeros.
    """
    tensors, parameters = arguments(name, shape, count)
    if vanishing is not None:
        tensors[vanishing][:, 1] = 0.0
    first = len(tensors) - parameters
    given = [x.to(dtype) if i < first and not is_bonus(name, i) else x.float() for i, x in enumerate(tensors)]
    rounded = [x if is_bonus(name, i) else x.to(dtype) for i, x in enumerate(given)]  # as parameters are used
    starts = some_starts(*shape[:2]) if documents else None
    wanted = run(name, [x.double() for x in rounded], shape[-1], "plain", starts)
    starts = None if starts is None else starts.to(device)
    found = run(name, [x.to(device) for x in given], shape[-1], "native", starts)
    return relative_errors([x.cpu() for x in found], wanted)


def hidden_nans(name: str) -> list[int]:
    """The arguments whose NaN reaches less of the native form's results and gradients than of the plain form's."""
    hidden = []
    for i in range(len(arguments(name, (1, 5, 2, 16))[0])):
        given, _ = arguments(name, (1, 5, 2, 16))
        given[i].view(-1)[3] = torch.nan
        wanted = run(name, given, 16, "plain")
        found = run(name, [x.float() for x in given], 16, "native")
        if not all(x[y.isnan()].isnan().all() for x, y in zip(found, wanted, strict=True)):
            hidden.append(i)
    return hidden


def run(
    name: str, given: list[torch.Tensor], size: int, choice: str, starts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Results and the gradients of everything."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    return with_gradients(results_of(name, leaves, choice, starts), leaves)


def results_of(
    name: str, given: list[torch.Tensor], choice: str, starts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Results of any pass."""
    if name in SHIFTED:
        return shifted(name, given, choice, starts)
    if name.startswith("prepare"):
        nothing = [None] if name == "prepare_block_0" else []
        tensors, vectors = given[: 6 - 2 * len(nothing)], given[6 - 2 * len(nothing) :]
        return list(fused.prepare(*tensors, *nothing * 2, *vectors, *nothing, choice=choice))
    return [getattr(fused, name)(*given, choice=choice)]


def with_gradients(results: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results and the gradients of all leaves, for fixed gradients of the results."""
    generator = torch.Generator().manual_seed(4)
    sent = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, sent)]


def shifted(
    name: str, given: list[torch.Tensor], choice: str = "auto", starts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Results of a pass of SHIFTED."""
    if name == "mix":
        return list(fused.mix(given[0], given[1:], starts, choice=choice))
    if name == "norm_mix":
        return list(fused.norm_mix(*given[:4], given[4:], starts, choice=choice))
    if name == "norm_mix_alone":
        x, weight, bias, m = given
        return list(fused.norm_mix(x, None, weight, bias, [None, m], starts, choice=choice)[1:])
    return list(fused.shift_blend(given[0], given[1:6], given[6:], starts, choice=choice))
