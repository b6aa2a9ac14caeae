"""The arguments that flash-linear-attention gets.

Its kernels need a GPU. Stand-ins that follow its documented signatures (log decay, scale, [key, value] states, and the
offsets of sequences in one row) take their place here, so what is tested is our side of the bargain.
"""

from __future__ import annotations

import sys
from functools import partial, wraps
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from naive_wkv import (
    VERSIONS,
    as_starts,
    each_document_alone,
    naive,
    random_inputs,
    relative_errors,
    values_and_gradients,
)

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import fla, ops, self_test


def started(r, initial_state):
    batch, _, heads, size = r.shape
    return r.new_zeros(batch, heads, size, size) if initial_state is None else initial_state  # [B,H,key,value]


def takes_sequences(operator):
    """With `cu_seqlens` as flash-linear-attention has it: batch size 1, a state for each sequence."""

    @wraps(operator)
    def on_each(*tensors, initial_state=None, cu_seqlens=None, **options):
        if cu_seqlens is None:
            return operator(*tensors, initial_state=initial_state, **options)
        assert tensors[0].shape[0] == 1
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, tensors[0].shape[1])
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        results = [
            operator(
                *(x[:, first:last] if x.ndim == 4 else x for x in tensors),
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                **options,
            )
            for i, (first, last) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        ys, finals = zip(*results, strict=True)
        return torch.cat(ys, 1), torch.cat(finals)

    return on_each


@takes_sequences
def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    s, ys = started(r, initial_state), []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        ys.append(torch.einsum("bhi,bhij->bhj", r[:, t] * scale, s + u[:, :, None] * kv))
        s = s * w[:, t, :, :, None].exp() + kv
    return torch.stack(ys, 1), s if output_final_state else None


@takes_sequences
def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False):
    s, ys = started(r, initial_state), []
    for t in range(r.shape[1]):
        sa = torch.einsum("bhi,bhij->bhj", a[:, t], s)
        s = (
            s * w[:, t, :, :, None].exp()
            + b[:, t, :, :, None] * sa[:, :, None]
            + k[:, t, :, :, None] * v[:, t, :, None]
        )
        ys.append(torch.einsum("bhi,bhij->bhj", r[:, t] * scale, s))
    return torch.stack(ys, 1), s if output_final_state else None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("rwkv6", chunk_rwkv6), ("rwkv7", chunk_rwkv7)):
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


@pytest.mark.parametrize("version", VERSIONS)
def test_decay_scale_and_state_are_given_as_it_wants_them(version, stand_in):
    inputs = [x.float().double() for x in random_inputs(version, 2, 12, 2, 8)]
    wanted = values_and_gradients(partial(naive, version), inputs)
    found = values_and_gradients(getattr(fla, version), inputs, torch.float32)
    assert max(relative_errors(found, wanted)) < 5e-6


@pytest.mark.parametrize("version", VERSIONS)
def test_documents_are_given_as_sequences_of_one_row(version, stand_in):
    starts = as_starts([[0, 3, 4, 9], [5], []], 12)
    inputs = [x.float().double() for x in random_inputs(version, 3, 12, 2, 8)]
    wanted = values_and_gradients(partial(each_document_alone, version, starts), inputs)
    found = values_and_gradients(partial(getattr(fla, version), starts=starts), inputs, torch.float32)
    assert max(relative_errors(found, wanted)) < 5e-6


@pytest.mark.parametrize("version", VERSIONS)
def test_doctor_allows_products_in_tf32(version, stand_in, monkeypatch):
    """Inputs cut to TF32's 10 bits of mantissa, as tensor cores take them."""
    name = "chunk_rwkv7" if version == "wkv7" else "chunk_rwkv6"
    module = sys.modules[f"fla.ops.{name.removeprefix('chunk_')}"]
    exact = getattr(module, name)

    def cut(x):
        return x + ((x.detach().view(torch.int32) & ~0x1FFF).view(torch.float32) - x.detach())

    def in_tf32(r, log_decay, *others, **options):
        return exact(cut(r), log_decay, *map(cut, others), **options)

    monkeypatch.setattr(module, name, in_tf32)
    monkeypatch.setattr(fla, "require", lambda device: None)
    error = self_test._error(version, 64, None, "fla", torch.float32, "cpu")
    assert self_test.FLOAT32_LIMIT < error < self_test.LIMITS["fla", torch.float32] / 2


def test_where_documents_begin_as_offsets():
    offsets, first, last = fla.sequences(as_starts([[0, 2], [3], [], [0, 1, 2, 3]], 4))
    assert offsets.tolist() == [0, 2, 4, 7, 8, 12, 13, 14, 15, 16]
    assert (first.tolist(), last.tolist()) == ([0, 2, 4, 5], [1, 3, 4, 8])
    assert offsets.dtype == torch.int64
    assert fla.sequences(torch.zeros(2, 5, dtype=torch.bool)).offsets.tolist() == [0, 5, 10]


def test_it_is_told_the_bound_of_the_decay_where_it_asks_and_no_state_where_there_is_none(stand_in, monkeypatch):
    given = {}

    def newer(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, lower_bound=None):
        given.update(bound=lower_bound, state=initial_state)
        assert lower_bound <= w.min()
        return chunk_rwkv7(r, w, k, v, a, b, scale, initial_state=initial_state, output_final_state=output_final_state)

    monkeypatch.setattr(sys.modules["fla.ops.rwkv7"], "chunk_rwkv7", newer)
    *inputs, _ = (x.float() for x in random_inputs("wkv7", 2, 12, 2, 8))
    y, final = fla.wkv7(*inputs)
    assert given == {"bound": pytest.approx(-0.60653066, abs=1e-7), "state": None}
    wanted, wanted_final = naive("wkv7", *(x.double() for x in inputs), torch.zeros(2, 2, 8, 8, dtype=torch.float64))
    assert max(relative_errors([y, final], [wanted, wanted_final])) < 5e-6


def test_on_a_cpu_it_is_refused():
    inputs = [x.float() for x in random_inputs("wkv7", 1, 8, 1, 4)]
    with pytest.raises(KernelError, match=r'"fla" .*needs a GPU, .*on a CPU'):
        ops.wkv7(*inputs, backend="fla")


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(KernelError, match=r"needs the package flash-linear-attention .*'rwkv-cluster\[fla\]'"):
        ops.require("fla", torch.device("cuda"), torch.bfloat16, 64)
