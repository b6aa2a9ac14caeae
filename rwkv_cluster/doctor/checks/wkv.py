"""The compiled kernels: found, or why not; every WKV backend's results, and a whole step's, beside float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rwkv_cluster.doctor.checks.software import has_torch
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, ok, problem, warning
from rwkv_cluster.errors import KernelError
from rwkv_cluster.runtime import rank_env

if TYPE_CHECKING:
    import torch

INSTEAD = "The chunked PyTorch form serves instead, more slowly"
_REPORT = f"report this with the output of `{sys.argv[0]} doctor --json`"


def libraries(context: CheckContext) -> list[Row]:
    """Compiled WKV libraries of the CPU and of each kind of GPU."""
    from rwkv_cluster.kernels import loader

    libraries_by_name = {"WKV kernels, CPU": loader.cpu()}
    for name, capability in _kinds_of_gpu():
        libraries_by_name[f"WKV kernels, {name}"] = loader.cuda(name, capability)
    rows = []
    for name, library in libraries_by_name.items():
        if isinstance(library, loader.Missing):
            rows.append(warning(name, f"{library.what}. {INSTEAD}", library.remedy))
        else:
            rows.append(ok(name, f"{library.target}, {library.path}"))
    return rows


def self_test(context: CheckContext) -> list[Row]:
    """Every backend that is here, on small inputs, forward and backward; a rank tests its own GPU."""
    if not has_torch():
        return []
    from rwkv_cluster.kernels import self_test

    rows: list[Row] = []
    with _one_thread_in_fp32():
        for device in _devices():
            with _failure_as_row(f"the WKV backends on {device}", rows):
                for backend, dtype, error, limit in self_test.run(device):
                    name, remedy = f"{backend} on {device}, {_named(dtype)}", "Use another training.wkv_backend"
                    rows.append(_compared(name, f"The WKV backend {name}", error, limit, remedy))
    return rows


def training_step(context: CheckContext) -> list[Row]:
    """The gradients of a step of each version, with every kernel that it takes here; a rank tests its own GPU."""
    if not has_torch():
        return []
    from rwkv_cluster.model import self_test

    rows: list[Row] = []
    with _one_thread_in_fp32():
        for device in _devices():
            with _failure_as_row(f"a training step on {device}", rows):
                for version, dtype, error, limit in self_test.run(device):
                    name = f"a step of {version} on {device}, {_named(dtype)}"
                    remedy = "Set training.fused to plain and training.wkv_backend to chunked"
                    rows.append(_compared(name, f"The gradient of {name}", error, limit, remedy))
    return rows


@contextmanager
def _one_thread_in_fp32() -> Iterator[None]:
    """Run the block in one thread, with a GPU's products of fp32 in fp32.

    On a busy machine several threads would wait for each other, for a minute in all. NVIDIA's containers of torch let
    products be TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), which would look like an error of ours.
    """
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _failure_as_row(what: str, rows: list[Row]) -> Iterator[None]:
    """Add a row where the block fails, as on a GPU whose driver or library does not suit it: the examination goes on.

    The first error of a GPU is the last that says anything, so nothing more is tried on it.
    """
    try:
        yield
    except RuntimeError as error:  # as ours, torch's and Triton's are
        text = f"{what[:1].upper()}{what[1:]} failed: {' '.join(str(error).split())[:300]}"
        rows.append(problem(f"self-test: {what}", text, f"Look at the driver's version, and {_REPORT}", KernelError))


def _compared(name: str, what: str, error: float, limit: float, remedy: str) -> Row:
    """A row for an error that is within its limit, or not, NaN included."""
    if error <= limit:
        return ok(f"self-test: {name}", f"relative error {error:.1e}", figure=-error)
    text = f"{what} is wrong: relative error {error:.1e} where {limit:.0e} is allowed"
    return problem(f"self-test: {name}", text, f"{remedy} and {_REPORT}", KernelError)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kinds_of_gpu() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of each kind of GPU that torch sees."""
    if not has_torch():
        return []
    import torch

    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return list(dict.fromkeys((gpu.name, (gpu.major, gpu.minor)) for gpu in every))


def _devices() -> list[str]:
    import torch

    every = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    cpu = ["cpu"] if rank_env.local_rank() == 0 else []
    if not rank_env.launched():
        return [*cpu, *every]
    return [*cpu, *every[rank_env.local_rank() :][:1]]
