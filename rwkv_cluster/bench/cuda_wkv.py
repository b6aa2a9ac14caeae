"""The WKV operators on a GPU: ours, flash-linear-attention, the plain chunked form, and what the memory would allow.

`rwkv-cluster bench wkv --device cuda`. Every contender is first held to float64 on a slice of the problem, and is not
timed where it is wrong. Then they take turns, timed by CUDA events after a write that empties the L2 cache. `bytes` is
the least that can be moved, every input, output and gradient once; `copy` is a device-to-device copy's bandwidth.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import ConfigError, KernelError
from rwkv_cluster.kernels import ops, reference

SHAPES = {"large": (8, 4096, 4096), "medium": (8, 4096, 2048), "small": (8, 1024, 768)}  # B, T, C
BACKENDS = ("native", "exact", "chunked", "fla")
LARGEST_ERROR = 3e-2
"""Relative L2, of outputs and gradients in bf16, above which a contender is not timed."""

Operator = Callable[..., tuple[Tensor, Tensor]]


def run(options: argparse.Namespace, inputs_of: Callable[..., tuple[list[Tensor], Tensor]]) -> dict[str, Any]:
    """Measure; seconds, bytes and GB/s.

    Args:
        options: `versions`, `shapes`, `repeats`, `head_size`, `dtype` of `bench wkv`.
        inputs_of: (version, options) -> the operator's arguments, without a state, and the gradient of y.

    Returns:
        {"device", "torch", "cuda", "python", "copy_gb_per_s", "cases": [{"version", "shape", "contenders": {..}}]}.

    Raises:
        ConfigError: torch finds no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here. Leave it out, or look at `rwkv-cluster doctor`"
        )
    copy = copy_bandwidth()
    cases = []
    for version in options.versions:
        for name in options.shapes:
            options.batch, options.time, options.width = SHAPES[name]
            cases.append({"version": version, "shape": name} | _case(version, options, inputs_of, copy))
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_per_s": copy / 1e9,
        "cases": cases,
    }


def format(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, CUDA {result['cuda']}, copy {result['copy_gb_per_s']:,.0f} GB/s",
        f"{'':28}{'fwd ms':>9}{'fwd+bwd ms':>12}{'min':>8}{'max':>8}{'GB/s':>8}{'% copy':>8}{'x native':>10}"
        f"{'extra MB':>10}",
    ]
    for case in result["cases"]:
        for name, c in case["contenders"].items():
            title = f"{case['version']} {case['shape']} {name}"
            if "refused" in c:
                lines.append(f"{title:28}  {c['refused']}")
                continue
            lines.append(
                f"{title:28}{1e3 * c['forward_s']:>9.2f}{1e3 * c['both_s']:>12.2f}{1e3 * c['both_s_min']:>8.2f}"
                f"{1e3 * c['both_s_max']:>8.2f}{c['gb_per_s']:>8,.0f}{c['percent_of_copy']:>8.0f}"
                f"{c['ratio']:>10.2f}{c['extra_mb']:>10,.0f}"
            )
    return "\n".join(lines)


def copy_bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(12)][2:]
    return 2 * n_bytes / statistics.median(times)


def _case(
    version: str, options: argparse.Namespace, inputs_of: Callable[..., tuple[list[Tensor], Tensor]], copy: float
) -> dict[str, Any]:
    inputs, dy = inputs_of(version, options)
    inputs = [x.detach().cuda().requires_grad_() for x in inputs]
    dy = dy.cuda()
    contenders: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        try:
            ops.require(backend, torch.device("cuda"), dy.dtype, options.head_size)
            error = _error(version, backend, inputs, dy)
            contenders[backend] = {"error": error}
            if not error < LARGEST_ERROR:
                contenders[backend]["refused"] = f"wrong: relative error {error:.1e}, not timed"
        except (KernelError, RuntimeError) as error:  # a rival may fail in ways of its own; the others go on
            contenders[backend] = {"refused": str(error).splitlines()[0][:160]}
    timed = [name for name, found in contenders.items() if "refused" not in found]
    rounds: list[dict[str, tuple[float, float]]] = []
    for index in range(options.repeats + 2):  # two turns to warm up
        turn = {name: _turn(version, name, inputs, dy) for name in timed}
        if index >= 2:
            rounds.append(turn)
    moved = _bytes(inputs, dy)
    for name in timed:
        both = [turn[name][1] for turn in rounds]
        median = statistics.median(both)
        contenders[name] |= {
            "forward_s": statistics.median(turn[name][0] for turn in rounds),
            "both_s": median,
            "both_s_min": min(both),
            "both_s_max": max(both),
            "gb_per_s": moved / median / 1e9,
            "percent_of_copy": 100 * moved / median / copy,
            "ratio": statistics.median(turn[name][1] / turn[timed[0]][1] for turn in rounds),
            "extra_mb": _extra_bytes(version, name, inputs, dy) / 1e6,
        }
    return {"tokens": options.batch * options.time, "bytes": moved, "contenders": contenders}


def _bytes(inputs: list[Tensor], dy: Tensor) -> int:
    """Forward reads the inputs and writes y; backward reads them and dy and writes their gradients."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    return 3 * size + 2 * dy.numel() * dy.element_size()


def _operator(version: str, backend: str) -> Operator:
    operator: Operator = getattr(ops, version)
    return lambda *inputs: operator(*inputs, backend=backend)


def _turn(version: str, backend: str, inputs: list[Tensor], dy: Tensor) -> tuple[float, float]:
    """Seconds of forward alone, and of forward and backward."""
    operator = _operator(version, backend)
    with torch.no_grad():
        forward = _timed(lambda: operator(*inputs))
    return forward, _timed(lambda: torch.autograd.grad(operator(*inputs)[0], inputs, dy))


def _timed(work: Callable[[], Any]) -> float:
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()  # empties the L2 cache
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _extra_bytes(version: str, backend: str, inputs: list[Tensor], dy: Tensor) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _turn(version, backend, inputs, dy)
    return torch.cuda.max_memory_allocated() - before


def _error(version: str, backend: str, inputs: list[Tensor], dy: Tensor) -> float:
    """Worst relative L2 error of y and the gradients on the first row, head and 128 steps."""
    steps = slice(0, 128)
    parts = [x.detach()[:1, steps, :1] if x.ndim == 4 else x.detach()[:1] for x in inputs]
    wanted = _values(getattr(reference, version), [x.double().cpu() for x in parts], dy[:1, steps, :1].double().cpu())
    found = _values(_operator(version, backend), [x.contiguous() for x in parts], dy[:1, steps, :1].contiguous())
    return max(float((x.double().cpu() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True))


def _values(operator: Operator, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, _ = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
