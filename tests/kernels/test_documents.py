"""Documents that begin from states of their own, beside each document alone, in float64 by an independent loop."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from naive_wkv import VERSIONS, as_starts, naive, random_inputs, relative_errors, values_and_gradients
from torch import Tensor

from rwkv_cluster.kernels import documents, ops
from rwkv_cluster.kernels.documents import Documents

TIME = 53
STARTS = {  # of three rows, whose first step begins a document in any case
    "none": [[], [], []],
    "several": [[3, 5, 9, 14, 20], [1, 7, 23, 24, 25], [2, 30, 52]],
    "all": [range(TIME), range(TIME), [0]],
}


def inputs_of(version: str, n_documents: int) -> list[Tensor]:
    *inputs, _ = random_inputs(version, 3, TIME, 2, 4)
    states = torch.randn(n_documents, 2, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [*inputs, states]


def each_document_alone(version: str, starts: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """y [B,T,H,N] and the state after each document [D,H,N,N]."""
    *tensors, states = inputs
    ys, finals = [], []
    for row, begins in enumerate(starts):
        edges = [*sorted({0, *begins.nonzero().flatten().tolist()}), TIME]
        for first, last in pairwise(edges):
            document = [x[row : row + 1, first:last] if x.ndim == 4 else x for x in tensors]
            y, final = naive(version, *document, states[len(finals) : len(finals) + 1])
            ys.append(y[0])
            finals.append(final)
    return torch.cat(ys).view_as(tensors[0]), torch.cat(finals)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_each_document_begins_from_its_own_state(version: str, where: str, backend: str) -> None:
    starts = as_starts(STARTS[where], TIME)
    rows = Documents(starts)
    inputs = inputs_of(version, len(rows))
    wanted = values_and_gradients(partial(each_document_alone, version, starts), inputs)

    def operator(*x: Tensor) -> tuple[Tensor, Tensor]:
        return documents.run(getattr(ops, version), x[:-1], x[-1], rows, backend)

    assert max(relative_errors(values_and_gradients(operator, inputs), wanted)) < 1e-12


@pytest.mark.parametrize("version", VERSIONS)
def test_the_compiled_kernel_too(version: str) -> None:
    starts = as_starts(STARTS["several"], TIME)
    rows = Documents(starts)
    inputs = [x.float().double() for x in inputs_of(version, len(rows))]
    wanted = values_and_gradients(partial(each_document_alone, version, starts), inputs)

    def operator(*x: Tensor) -> tuple[Tensor, Tensor]:
        return documents.run(getattr(ops, version), x[:-1], x[-1], rows, "native")

    assert max(relative_errors(values_and_gradients(operator, inputs, torch.float32), wanted)) < 2e-6


def test_rows_without_such_documents_are_the_operators_own() -> None:
    *inputs, state = random_inputs("wkv7", 3, TIME, 2, 4)
    starts = as_starts(STARTS["several"], TIME)
    for given in (None, starts):
        found = documents.run(ops.wkv7, inputs, state, given, "reference")
        wanted = ops.wkv7(*inputs, state, starts=given, backend="reference")
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert documents.flags(starts) is starts
    assert documents.flags(Documents(starts))[:, 0].all()
    assert documents.flags(None) is None
