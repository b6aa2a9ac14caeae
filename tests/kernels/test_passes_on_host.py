"""The CUDA library's fused passes, from the same sources, run by the host shim in place of the CPU library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fused_passes import LIMITS, NATIVE, SHAPES, SHIFTED, arguments, errors_of, hidden_nans, run, some_starts

from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.fused import native
from rwkv_cluster.kernels.signatures import Rows

pytestmark = pytest.mark.system  # the shim takes a compiler half a minute
CUDA_SHAPES = [
    *SHAPES,
    (1, 17, 9, 32),  # 288 channels: more than a warp has, and a second one that lacks most of its lanes
    (1, 5, 2, 128),
    (2, 3, 2, 256),
    (1, 129, 1, 16),  # the last block has one row
    (1, 1, 1, 16),
]


@pytest.fixture(autouse=True)
def _shim_in_place_of_the_cpu_library(host_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NaN in uninitialised memory too."""
    host_library.rwkv_host_schedule(0)
    monkeypatch.setattr(loader, "cpu", lambda: loader.Library(host_library, Path("libwkv_host.so"), "host"))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_results_and_every_gradient(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    errors = errors_of(name, shape, dtype)
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
@pytest.mark.parametrize("name", SHIFTED)
def test_the_token_shift_sees_no_other_document(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    errors = errors_of(name, shape, dtype, documents=True)
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["mix", "norm_mix"])
def test_any_number_of_mixes(name: str, count: int) -> None:
    errors = errors_of(name, (2, 33, 1, 32), torch.float32, documents=True, count=count)
    assert max(errors) < LIMITS[torch.float32], errors


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_norm_and_mixes_in_blocks_of_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has these for a batch of few rows."""
    monkeypatch.setattr(native, "ROWS_IN_BLOCK", rows)
    errors = errors_of("norm_mix", (2, 33, 3, 32), torch.float32, documents=True)
    assert max(errors) < LIMITS[torch.float32], errors


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 1040), (torch.bfloat16, 2560)], ids=str)
def test_the_widest_norms(dtype: torch.dtype, width: int) -> None:
    """Of several warps, and of all that a block may have."""
    errors = errors_of("norm_mix", (1, 3, 1, width), dtype)
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize("name", NATIVE)
def test_every_schedule_gives_the_same_bits(name: str, host_library: ctypes.CDLL) -> None:
    tensors, _ = arguments(name, (2, 60, 9, 32))
    given = [x.float() for x in tensors]
    results = []
    for seed in range(4):
        host_library.rwkv_host_schedule(seed)
        results.append(run(name, given, 32, "native", some_starts(2, 60)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_hides_a_nan(name: str) -> None:
    assert not hidden_nans(name)


def test_a_vanishing_key_has_finite_gradients() -> None:
    errors = errors_of("prepare", (1, 3, 1, 16), torch.float32, vanishing=1)
    assert max(errors) < LIMITS[torch.float32], errors


def test_views_at_any_address_are_read() -> None:
    """16 bytes are read at once: these begin 4 and 8 bytes after a multiple of that."""
    tensors, _ = arguments("prepare", (1, 3, 1, 16))
    given = [x.float() for x in tensors]
    moved = [torch.empty(x.numel() + 2)[1 + i % 2 :][: x.numel()].view_as(x).copy_(x) for i, x in enumerate(given)]
    assert all(x.data_ptr() % 16 for x in moved)
    assert all(map(torch.equal, run("prepare", moved, 16, "native"), run("prepare", given, 16, "native")))


def test_what_has_no_kernel_is_refused(host_library: ctypes.CDLL) -> None:
    rows = {1: Rows(rows=1, time=1, width=48, size=48), 2: Rows(rows=1, time=1, width=16, size=16, io=3)}
    no_pointers = (ctypes.c_void_p * 11)()
    for status, shape in rows.items():
        assert host_library.rwkv_prepare_forward(ctypes.byref(shape), *[ctypes.byref(no_pointers)] * 2) == status
    too_many = Rows(rows=1, time=1, width=16, size=16)
    assert host_library.rwkv_mix_forward(ctypes.byref(too_many), 7, *[None] * 3) == 1
    assert host_library.rwkv_norm_mix_forward(ctypes.byref(too_many), 3, 64, *[None] * 8) == 1
    too_wide = Rows(rows=1, time=1, width=2576, size=16)
    assert host_library.rwkv_norm_mix_forward(ctypes.byref(too_wide), 1, 64, *[None] * 8) == 1
    too_long = Rows(rows=2**31 - 1, time=1, width=16, size=16)  # whose last rows' numbers would not fit
    assert host_library.rwkv_norm_mix_forward(ctypes.byref(too_long), 1, 64, *[None] * 8) == 1
    nothing = Rows(rows=0, time=1, width=16, size=16)
    assert host_library.rwkv_prepare_forward(ctypes.byref(nothing), *[ctypes.byref(no_pointers)] * 2) == 0
