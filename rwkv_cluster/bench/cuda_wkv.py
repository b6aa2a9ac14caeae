"""The WKV operators on a GPU: ours, flash-linear-attention, the plain chunked form, and what the memory would allow.

`rwkv-cluster bench wkv --device cuda`. Every contender first computes the whole problem: its first and last row and
head are held to float64, all of it to the exact kernel, and it is not timed where it is wrong. Then they take turns,
timed by CUDA events after a write that empties the L2 cache, on a device that is still busy when the host begins: what
is measured is the device, not the host's launches. One that fails says why, and the others go on. `bytes` is the least
that can be moved, every input, output and gradient once; `copy` is a device-to-device copy's bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.bench import results
from rwkv_cluster.errors import ConfigError, KernelError
from rwkv_cluster.kernels import native, ops, reference

SHAPES = {"large": (8, 4096, 4096), "medium": (8, 4096, 2048), "small": (8, 1024, 768)}  # B, T, C
BACKENDS = ("native", "exact", "chunked", "fla")
LARGEST_ERROR = 3e-2
"""Relative L2, of outputs and gradients in bf16, above which a contender is not timed."""

CHECKED_STEPS = 128
BUSY_CYCLES = 4_000_000
"""For which the device waits before each measurement: two milliseconds, longer than the host needs to launch a turn."""

Operator = Callable[..., tuple[Tensor, Tensor]]
Clock = Callable[[Callable[[], Any]], float]
"""Runs what it is given and returns its seconds."""


def run(options: argparse.Namespace, inputs_of: Callable[..., tuple[list[Tensor], Tensor]]) -> dict[str, Any]:
    """Measure; seconds, bytes and GB/s.

    Args:
        options: `versions`, `shapes`, `repeats`, `head_size`, `dtype`, `output` of `bench wkv`.
        inputs_of: (version, options) -> the operator's arguments, without a state, and the gradient of y.

    Returns:
        {"device", "torch", "cuda", "python", "copy_gb_per_s", "cases": [{"version", "shape", "contenders": {..},
        "forms": {..}}]}.

    Raises:
        ConfigError: torch finds no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here", remedy="Leave it out, or look at `rwkv-cluster doctor`"
        )
    timed = Timer()
    copy = copy_bandwidth(timed)
    cases: list[dict[str, Any]] = []
    result = {
        "options": vars(options),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_per_s": copy / 1e9,
        "cases": cases,
    }
    for version in options.versions:
        for name in options.shapes:
            options.batch, options.time, options.width = SHAPES[name]
            cases.append({"version": version, "shape": name} | _case(version, options, inputs_of, copy, timed))
            results.keep(result, options.output, "\n".join(_lines(cases[-1])))
    return result


def format(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, CUDA {result['cuda']}, copy {result['copy_gb_per_s']:,.0f} GB/s",
        f"{'':28}{'fwd ms':>9}{'fwd+bwd ms':>12}{'min':>8}{'max':>8}{'GB/s':>8}{'% copy':>8}{'x native':>10}"
        f"{'extra MB':>10}",
    ]
    return "\n".join([*lines, *(line for case in result["cases"] for line in _lines(case))])


def _lines(case: dict[str, Any]) -> list[str]:
    lines = []
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
    for name, seconds in case["forms"].items():
        lines.append(
            f"{case['version']} {case['shape']} native, {name} between barriers: forward {1e3 * seconds:.2f} ms"
        )
    return lines


class Timer:
    """Seconds of the device's work by CUDA events.

    The buffer that empties the L2 cache is there once, before anything is measured. After the
    write the device waits, in which the host launches the work.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], Any]) -> float:
        self._flush.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def copy_bandwidth(timed: Clock, n_bytes: int = 1 << 30) -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(12)][2:]
    return 2 * n_bytes / statistics.median(times)


def _case(
    version: str,
    options: argparse.Namespace,
    inputs_of: Callable[..., tuple[list[Tensor], Tensor]],
    copy: float,
    timed: Clock,
) -> dict[str, Any]:
    inputs, dy = inputs_of(version, options)
    inputs = [x.detach().to(options.device).requires_grad_() for x in inputs]
    dy = dy.to(options.device)
    contenders: dict[str, dict[str, Any]] = {name: {} for name in BACKENDS}
    for name, found in contenders.items():
        with _refusal(found):
            ops.require(name, dy.device, dy.dtype, options.head_size)
            found["error"] = _error(version, name, inputs, dy)
            if not found["error"] < LARGEST_ERROR:
                found["refused"] = f"wrong: relative error {found['error']:.1e}, not timed"
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for index in range(options.repeats + 2):  # two turns to warm up
        for name in _going_on(contenders):
            with _refusal(contenders[name]):
                turn = _turn(version, name, inputs, dy, timed)
                if index >= 2:
                    rounds[name].append(turn)
    moved, first = _bytes(inputs, dy), next(iter(_going_on(contenders)), None)
    for name in _going_on(contenders):
        both = [turn[1] for turn in rounds[name]]
        median = statistics.median(both)
        assert first is not None
        with _refusal(contenders[name]):
            contenders[name] |= {
                "forward_s": statistics.median(turn[0] for turn in rounds[name]),
                "both_s": median,
                "both_s_min": min(both),
                "both_s_max": max(both),
                "gb_per_s": moved / median / 1e9,
                "percent_of_copy": 100 * moved / median / copy,
                "ratio": statistics.median(a[1] / b[1] for a, b in zip(rounds[name], rounds[first], strict=True)),
                "extra_mb": _extra_bytes(version, name, inputs, dy) / 1e6,
            }
    has_forms = (
        version == "wkv7" and options.head_size == native.TENSOR_CORE_HEAD_SIZE and "native" in _going_on(contenders)
    )
    forms = _forms(inputs, options.repeats, timed) if has_forms else {}
    return {"tokens": options.batch * options.time, "bytes": moved, "contenders": contenders, "forms": forms}


def _forms(inputs: list[Tensor], repeats: int, timed: Clock) -> dict[str, float]:
    """Seconds of RWKV-7's forward pass that keeps what backward needs, by the steps that it takes between barriers."""
    kernels = {"16 steps": native.TENSOR_CORES_16, "32 steps": native.TENSOR_CORES}
    turns = [
        {name: timed(partial(native.wkv7_forward, inputs, kernel)) for name, kernel in kernels.items()}
        for _ in range(repeats + 2)
    ]
    return {name: statistics.median(turn[name] for turn in turns[2:]) for name in kernels}


@contextlib.contextmanager
def _refusal(contender: dict[str, Any]) -> Iterator[None]:
    """Keep what a contender fails with, a rival in ways of its own, as its result."""
    try:
        yield
    except (KernelError, RuntimeError) as error:  # out of memory is a RuntimeError
        contender["refused"] = str(error).splitlines()[0][:160]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _going_on(contenders: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, result in contenders.items() if "refused" not in result]


def _bytes(inputs: list[Tensor], dy: Tensor) -> int:
    """Forward reads the inputs and writes y; backward reads them and dy and writes their gradients."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    return 3 * size + 2 * dy.numel() * dy.element_size()


def _operator(version: str, backend: str) -> Operator:
    operator: Operator = getattr(ops, version)
    return lambda *inputs: operator(*inputs, backend=backend)


def _turn(version: str, backend: str, inputs: list[Tensor], dy: Tensor, timed: Clock) -> tuple[float, float]:
    """Seconds of forward alone, and of forward and backward."""
    operator = _operator(version, backend)
    with torch.no_grad():
        forward = timed(lambda: operator(*inputs))
    return forward, timed(lambda: torch.autograd.grad(operator(*inputs)[0], inputs, dy))


def _extra_bytes(version: str, backend: str, inputs: list[Tensor], dy: Tensor) -> int:
    """How much more is allocated at the highest, of one forward and backward pass."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _values(_operator(version, backend), inputs, dy)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _error(version: str, backend: str, inputs: list[Tensor], dy: Tensor) -> float:
    """Worst relative L2 error of y and the gradients, of the whole problem.

    The first head of the first row and the last of the last, in their first 128 steps, are held to float64. What comes
    later has no gradient there, so that these steps do not depend on it. Then all of it is held to the exact kernel.
    """
    operator, definition = _operator(version, backend), getattr(reference, version)
    n_rows, n_heads = dy.shape[0], dy.shape[2]
    few = torch.zeros_like(dy)
    corners = dict.fromkeys([(0, 0), (n_rows - 1, n_heads - 1)])
    for row, head in corners:
        few[row, :CHECKED_STEPS, head] = dy[row, :CHECKED_STEPS, head]
    values = _values(operator, inputs, few)
    errors = []
    for corner in corners:
        expected = _values(definition, [_part(x, *corner) for x in inputs], _part(dy, *corner))
        errors += [_relative(_part(x, *corner), y) for x, y in zip(values, expected, strict=True)]
    if backend != "exact" and native.unavailable(str(dy.device), dy.dtype, dy.shape[-1]) is None:
        pairs = zip(_values(operator, inputs, dy), _values(_operator(version, "exact"), inputs, dy), strict=True)
        errors += [_relative(x.float(), y.float()) for x, y in pairs]
    return max(errors)


def _part(x: Tensor, row: int, head: int) -> Tensor:
    """Part of x [B,T,H,N] or [H,N] that is checked of a row and head, in float64."""
    heads = slice(head, head + 1)
    return (x.detach()[row : row + 1, :CHECKED_STEPS, heads] if x.ndim == 4 else x.detach()[heads]).double().cpu()


def _relative(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).norm() / reference.norm())


def _values(operator: Operator, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, _ = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
