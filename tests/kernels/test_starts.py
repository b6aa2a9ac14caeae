"""Documents in one row: the operators with `starts` beside each document alone, in float64 by an independent loop."""

from __future__ import annotations

from functools import partial

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
from rwkv_cluster.kernels import ops
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


def test_starts_that_do_not_fit_are_refused():
    inputs = random_inputs("wkv6", 2, 3, 1, 4)
    with pytest.raises(KernelError, match=r"starts has shape \(2, 4\), expected \(2, 3\)"):
        ops.wkv6(*inputs, starts=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(KernelError, match=r"starts has dtype torch\.uint8, expected torch\.bool"):
        ops.wkv6(*inputs, starts=torch.zeros(2, 3, dtype=torch.uint8))
