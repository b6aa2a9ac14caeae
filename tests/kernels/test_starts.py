"""Documents in one row: the operators with `starts` beside each document alone, in float64 by an independent loop."""

from __future__ import annotations

from functools import partial

import host_kernels
import pytest
import torch
from naive_wkv import (
    VERSIONS,
    as_starts,
    each_document_alone,
    random_inputs,
    relative_errors,
    values_and_gradients,
)

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader, ops
from rwkv_cluster.kernels.chunked import layout as chunk_layout

TIME = 53
STARTS = {  # of three rows; chunks have 16 steps
    "none": [[], [], []],
    "edges": [[0, 16, 32, 48], [16], [15, 17, 33]],
    "several": [[3, 5, 9, 14, 20], [1, 7, 23, 24, 25], [2, 30, 52]],
    "all": [range(TIME), range(TIME), [0]],
}


@pytest.fixture(autouse=True)
def _small_segments_of_nan(monkeypatch):
    monkeypatch.setattr(chunk_layout, "SEGMENT_BYTES", 1 << 12)
    torch.use_deterministic_algorithms(True)  # also fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_know_nothing_of_each_other(version, where, backend):
    starts = as_starts(STARTS[where], TIME)
    inputs = random_inputs(version, 3, TIME, 2, 4)
    wanted = values_and_gradients(partial(each_document_alone, version, starts), inputs)
    found = values_and_gradients(partial(getattr(ops, version), starts=starts, backend=backend), inputs)
    assert max(relative_errors(found, wanted)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_compiled_kernel_in_lower_precision(version, dtype):
    starts = as_starts(STARTS["several"], TIME)
    *inputs, state = random_inputs(version, 3, TIME, 2, 20)
    inputs = [*(x.to(dtype).double() for x in inputs), state.to(dtype).double()]
    wanted = values_and_gradients(partial(each_document_alone, version, starts), inputs)
    operator = partial(getattr(ops, version), starts=starts, backend="native")
    found = values_and_gradients(lambda *x: operator(*x[:-1], x[-1].float()), inputs, dtype)
    assert max(relative_errors(found, wanted)) < (2e-6 if dtype == torch.float32 else 2.5e-3)


@pytest.mark.system
@pytest.mark.parametrize("target", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_instruction_set(version, target):
    library = loader.cpu()
    assert isinstance(library, loader.Library), library
    if library.handle.rwkv_select_target(target.encode()):
        pytest.skip(f"this processor has no {target}")
    try:
        for where, size in (("edges", 64), ("several", 20), ("several", 128)):
            starts = as_starts(STARTS[where], TIME)
            inputs = [x.float().double() for x in random_inputs(version, 3, TIME, 1, size)]
            wanted = values_and_gradients(partial(each_document_alone, version, starts), inputs)
            found = host_kernels.values_and_gradients(library.handle, version, inputs, starts=starts)
            assert max(relative_errors(found, wanted)) < 2e-6, where
    finally:
        library.handle.rwkv_select_target(library.target.encode())


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("version", VERSIONS)
def test_no_start_is_the_same_bits_as_none(version, backend):
    inputs = [x.float() for x in random_inputs(version, 3, TIME, 2, 20)]
    operator = partial(getattr(ops, version), backend=backend)
    whole = values_and_gradients(operator, inputs, torch.float32)
    without = values_and_gradients(partial(operator, starts=as_starts([[], [], []], TIME)), inputs, torch.float32)
    assert all(map(torch.equal, whole, without))


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_document_that_decays_at_once_or_not_at_all_leaves_no_trace(version, backend):
    starts = as_starts([[5, 20, 21, 40]], TIME)
    inputs = random_inputs(version, 1, TIME, 2, 16)
    if version != "wkv5":  # whose decay is the same for all documents
        w = inputs[1 if version == "wkv7" else 3]
        for step, value in ((0, 1000.0), (20, -20.0), (21, 1000.0)):
            w[:, step : step + 15] = value
    changed = [x.clone() for x in inputs]
    for x in changed:
        if x.ndim == 4 and x is not changed[-1]:
            x[:, :20] *= -3
    changed[-1] *= 1e3
    results = []
    for given in (inputs, changed):
        operator = partial(getattr(ops, version), starts=starts, backend=backend)
        y, final, *grads, _ = values_and_gradients(operator, given, torch.float32)
        results.append([y[:, 20:], final, *(g[:, 20:] for g in grads if g.ndim == 4)])
    assert all(torch.isfinite(x).all() for x in results[0])
    assert max(relative_errors(results[1], results[0])) < 2e-6


def test_starts_that_do_not_fit_are_refused():
    inputs = random_inputs("wkv6", 2, 3, 1, 4)
    with pytest.raises(KernelError, match=r"starts has shape \(2, 4\), expected \(2, 3\)"):
        ops.wkv6(*inputs, starts=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(KernelError, match=r"starts has dtype torch\.uint8, expected torch\.bool"):
        ops.wkv6(*inputs, starts=torch.zeros(2, 3, dtype=torch.uint8))
