"""The WKV operators alone, forward plus backward: the compiled kernel and its rivals.

Rivals on a CPU: the chunked form in PyTorch; the time loop; for RWKV-7 a chunk form under torch.compile
(`compiled_chunk`) and the loop of `rwkv-trainer`, where it is at hand.

Everything runs in one process, in alternating turns, so that a machine whose speed drifts treats all alike; ratios
are taken turn by turn. An unmeasured turn of the same contender comes before each measured one: in training too an
operator follows itself, and finds its memory where the last call left it. `extra_mb` is how much the resident memory
grew at its highest during one turn (Linux only).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.bench import compiled_chunk, cuda_wkv
from rwkv_cluster.errors import ConfigError, KernelError
from rwkv_cluster.kernels import native, reference
from rwkv_cluster.kernels.chunked import wkv as chunked

OURS = "native"
_VERSIONS = ("wkv7", "wkv6", "wkv5")
_RIVAL_FILE = Path("rwkv_trainer", "model", "model.py")


def run(args: Sequence[str]) -> dict[str, Any]:
    """Measure with command-line arguments `args`; seconds and MB.

    Returns:
        {"options": {..}, "torch": version, "cases": [{"version", "tokens", "contenders": {name: {"cpu_s", "wall_s",
        "cpu_s_min", "cpu_s_max", "tokens_per_s", "extra_mb", "ratio"}}}]}, where ratio is the CPU time over ours.

    Raises:
        KernelError: there is no compiled kernel for these inputs.
        ConfigError: --seed-package has no rwkv-trainer, or the width is not a multiple of the head size.
    """
    options = _parser().parse_args(args)
    if options.device == "cuda":
        options.dtype = "bfloat16"
        return cuda_wkv.run(options, _inputs)
    if options.width % options.head_size:
        raise ConfigError(f"--width {options.width} is not a multiple of --head-size {options.head_size}.")
    if reason := native.unavailable("cpu", getattr(torch, options.dtype), options.head_size):
        raise KernelError(reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rival = _rival(options.seed_package, options.head_size)
        cases = [_case(version, options, rival) for version in options.versions]
    finally:
        torch.set_num_threads(threads)
    return {"options": vars(options), "torch": torch.__version__, "cases": cases}


def format(result: dict[str, Any]) -> str:
    """The result as a table."""
    if result["options"]["device"] == "cuda":
        return cuda_wkv.format(result)
    o = result["options"]
    lines = [
        f"forward + backward, B{o['batch']} T{o['time']} C{o['width']} N{o['head_size']} {o['dtype']}, "
        f"{o['threads']} thread(s), median of {o['repeats']}, torch {result['torch']}",
        f"{'':22}{'tokens/s':>10}{'CPU ms':>9}{'min':>8}{'max':>8}{'wall ms':>9}{'x ours':>8}{'extra MB':>10}",
    ]
    for case in result["cases"]:
        for name, c in case["contenders"].items():
            milliseconds = (1e3 * c[key] for key in ("cpu_s", "cpu_s_min", "cpu_s_max", "wall_s"))
            cpu, low, high, wall = (f"{x:.1f}" for x in milliseconds)
            memory = "-" if c["extra_mb"] is None else f"{c['extra_mb']:.0f}"
            lines.append(
                f"{case['version'] + ' ' + name:22}{c['tokens_per_s']:>10,.0f}{cpu:>9}{low:>8}{high:>8}{wall:>9}"
                f"{c['ratio']:>8.2f}{memory:>10}"
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rwkv-cluster bench wkv", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--versions", nargs="+", choices=_VERSIONS, default=list(_VERSIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(cuda_wkv.SHAPES),
        default=list(cuda_wkv.SHAPES),
        help="of --device cuda, in bfloat16",
    )
    parser.add_argument("--output", help="file that --device cuda writes after each case, as --json prints in the end")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what torch.compile makes")
    parser.add_argument("--seed-package", help="folder that holds rwkv_trainer, when it is not installed")
    return parser


def _case(version: str, options: argparse.Namespace, rival: Callable[..., Tensor] | None) -> dict[str, Any]:
    inputs, dy = _inputs(version, options)
    contenders = {
        OURS: partial(_turn, getattr(native, version), inputs, dy),
        "chunked": partial(_turn, getattr(chunked, version), inputs, dy),
        "time loop": partial(_turn, getattr(reference, version), inputs, dy),
    }
    if options.compile and version == "wkv7":
        contenders["compiled chunk"] = partial(_turn, compiled_chunk.compiled(), inputs, dy)
    if rival and version == "wkv7":
        contenders["rwkv-trainer loop"] = partial(_turn, *_rival_arguments(rival, inputs, dy))
    memory = {name: _extra_mb(turn) for name, turn in contenders.items()}  # also the unmeasured first turn
    turns = [{name: _timed(turn) for name, turn in contenders.items()} for _ in range(options.repeats)]
    tokens = options.batch * options.time
    return {
        "version": version,
        "tokens": tokens,
        "contenders": {name: _summary(name, turns, tokens) | {"extra_mb": memory[name]} for name in contenders},
    }


def _summary(name: str, turns: list[dict[str, tuple[float, float]]], tokens: int) -> dict[str, float]:
    cpu = [turn[name][0] for turn in turns]
    return {
        "cpu_s": statistics.median(cpu),
        "cpu_s_min": min(cpu),
        "cpu_s_max": max(cpu),
        "wall_s": statistics.median(turn[name][1] for turn in turns),
        "tokens_per_s": tokens / statistics.median(cpu),
        "ratio": statistics.median(turn[name][0] / turn[OURS][0] for turn in turns),
    }


def _inputs(version: str, options: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """Arguments of the operator, without a state, and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    heads = options.width // options.head_size
    full = (options.batch, options.time, heads, options.head_size)

    def normal(shape: tuple[int, ...] = full) -> Tensor:
        return torch.randn(shape, generator=generator)

    if version == "wkv7":
        kappa = torch.nn.functional.normalize(normal(), dim=-1)
        inputs = [normal(), normal(), normal(), normal(), -kappa, kappa * torch.sigmoid(normal())]
    else:
        per_head = full[2:]
        inputs = [normal(), normal(), normal(), normal(full if version == "wkv6" else per_head) - 2, normal(per_head)]
    return [x.to(dtype).requires_grad_() for x in inputs], normal().to(dtype)


def _turn(operator: Callable[..., Any], inputs: list[Tensor], dy: Tensor) -> None:
    result = operator(*inputs)
    y = result[0] if isinstance(result, tuple) else result
    torch.autograd.grad(y, inputs, dy)


def _timed(turn: Callable[[], None]) -> tuple[float, float]:
    """Seconds of CPU time and of wall time of the second of two turns."""
    turn()
    cpu, wall = time.process_time(), time.perf_counter()
    turn()
    return time.process_time() - cpu, time.perf_counter() - wall


def _extra_mb(turn: Callable[[], None]) -> float | None:
    """Growth of the resident memory at its peak, from the kernel's own high-water mark; None where there is none."""
    turn()
    try:
        with contextlib.suppress(AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_kb("VmRSS")
        turn()
        return (_resident_kb("VmHWM") - before) / 1e3
    except OSError:
        return None


def _resident_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _rival(folder: str | None, head_size: int) -> Callable[..., Tensor] | None:
    """The RWKV-7 loop that `rwkv-trainer` runs without CUDA; None when the package is not at hand.

    Its module reads the environment when imported and prints, so it is loaded by its file, with both kept away.
    """
    places = [Path(folder)] if folder else [Path(entry) for entry in sys.path]
    path = next((place / _RIVAL_FILE for place in places if (place / _RIVAL_FILE).is_file()), None)
    if path is None and folder:
        raise ConfigError(
            f"--seed-package {folder} has no {_RIVAL_FILE}", remedy="Give the folder that holds rwkv_trainer."
        )
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("rwkv_trainer_model", path)
    assert spec is not None  # true of every path ending in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    settings = {"RWKV_HEAD_SIZE_A": str(head_size), "RWKV_MY_TESTING": "", "RWKV_JIT_ON": "0"}
    with _environment(settings), contextlib.redirect_stdout(io.StringIO()):
        try:
            spec.loader.exec_module(module)
        except ImportError:  # it needs its own versions of other packages
            return None
    return module._run_torch_rwkv7g


def _rival_arguments(
    loop: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor
) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The same work in its layout, [B,T,C], and with its decay argument, log(-log d)."""
    r, w, k, v, a, b = (x.detach().flatten(2) for x in inputs)
    w = -torch.nn.functional.softplus(-w) - 0.5
    return loop, [x.requires_grad_() for x in (r, w, k, v, a, b)], dy.flatten(2)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
