"""The reference loops and the chunked forms against float64 autograd over an independent loop."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_wkv import VERSIONS, naive, random_inputs, relative_errors, values_and_gradients

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import ops
from rwkv_cluster.kernels.chunked import layout as chunk_layout
from rwkv_cluster.kernels.chunked import wkv6 as chunked_wkv6
from rwkv_cluster.kernels.chunked import wkv7 as chunked_wkv7

SHAPES = [(2, 1, 2, 4), (1, 15, 1, 8), (2, 16, 3, 4), (1, 33, 2, 16), (2, 77, 1, 8)]


@pytest.fixture(autouse=True)
def _small_segments_of_nan(monkeypatch):
    """Several segments even for tiny inputs, and NaN in every torch.empty, so that no unwritten value goes unseen."""
    monkeypatch.setattr(chunk_layout, "SEGMENT_BYTES", 1 << 12)
    torch.use_deterministic_algorithms(True)  # also fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


def operator(version: str, backend: str):
    return partial(getattr(ops, version), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_float64_forward_and_every_gradient(version, shape, backend):
    inputs = random_inputs(version, *shape)
    wanted = values_and_gradients(partial(naive, version), inputs)
    assert max(relative_errors(values_and_gradients(operator(version, backend), inputs), wanted)) < 1e-12


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_chunked_is_as_exact_as_float32_can_be(version):
    inputs = [x.float().double() for x in random_inputs(version, 2, 77, 2, 64)]
    wanted = values_and_gradients(partial(naive, version), inputs)
    errors = relative_errors(values_and_gradients(operator(version, "chunked"), inputs, torch.float32), wanted)
    assert max(errors[:2]) < 5e-7
    assert max(errors[2:]) < 4e-6


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("version", VERSIONS)
def test_other_chunk_lengths(version, chunk, monkeypatch):
    for module in (chunked_wkv6, chunked_wkv7):
        monkeypatch.setattr(module, "CHUNK", chunk)
    inputs = random_inputs(version, 2, 75, 1, 8)
    wanted = values_and_gradients(partial(naive, version), inputs)
    assert max(relative_errors(values_and_gradients(operator(version, "chunked"), inputs), wanted)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", ["mixed", "slowest", "fastest", "infinite"])
@pytest.mark.parametrize("version", VERSIONS)
def test_any_decay(version, decay, dtype):
    inputs = random_inputs(version, 1, 37, 2, 16)
    w_index = 1 if version == "wkv7" else 3
    w = inputs[w_index]
    generator = torch.Generator().manual_seed(5)
    inputs[w_index] = {
        "mixed": torch.rand(w.shape, generator=generator, dtype=torch.float64) * 26 - 20,
        "slowest": torch.full_like(w, -20.0),
        "fastest": torch.full_like(w, 6.0),
        "infinite": torch.full_like(w, 1000.0),
    }[decay]
    inputs = [x.float().double() for x in inputs]
    wanted = values_and_gradients(partial(naive, version), inputs)
    found = values_and_gradients(operator(version, "chunked"), inputs, dtype)
    if decay == "infinite":  # the naive gradient of w is 0 * inf; the true one is 0
        wanted[2 + w_index] = torch.zeros_like(w)
    errors = relative_errors(found, wanted)
    if version != "wkv7" and decay in ("fastest", "infinite"):  # 1e-173 at most, and 0 / 0 as an error
        assert torch.equal(found[2 + w_index], torch.zeros_like(found[2 + w_index]))
        errors[2 + w_index] = 0.0
    # float32: 1 - sigmoid(6), in the gradient of wkv7's w, has 1e-5 of rounding by itself
    assert max(errors) < (4e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("similarity", [0.9, 1.0])
def test_correlated_keys_of_rwkv7(similarity):
    inputs = random_inputs("wkv7", 1, 64, 1, 32)
    kappa = torch.nn.functional.normalize(inputs[5], dim=-1)
    kappa = torch.nn.functional.normalize(similarity * kappa[:, :1] + (1 - similarity) * kappa, dim=-1)
    inputs[1], inputs[4], inputs[5] = torch.full_like(kappa, -8.0), -kappa, kappa
    wanted = values_and_gradients(partial(naive, "wkv7"), inputs)
    errors = relative_errors(values_and_gradients(operator("wkv7", "chunked"), inputs, torch.float32), wanted)
    assert max(errors) < 5e-6


@pytest.mark.parametrize("version", VERSIONS)
def test_gradcheck(version):
    inputs = [x.requires_grad_() for x in random_inputs(version, 1, 18, 1, 2)]
    assert torch.autograd.gradcheck(operator(version, "chunked"), inputs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_rounds_only_inputs_and_outputs(version, dtype, backend):
    inputs = [x.to(dtype).double() for x in random_inputs(version, 2, 21, 2, 8)]
    wanted = values_and_gradients(partial(naive, version), inputs)
    *arguments, state = (x.to(dtype).requires_grad_() for x in inputs)
    state = state.detach().float().requires_grad_()
    found = values_and_gradients(lambda *x: operator(version, backend)(*x[:-1], x[-1].float()), inputs, dtype)
    assert max(relative_errors(found, wanted)) < torch.finfo(dtype).eps
    y, final = operator(version, backend)(*arguments, state)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    grads = torch.autograd.grad(y.float().sum() + final.sum(), [*arguments, state])
    assert [g.dtype for g in grads] == [dtype] * len(arguments) + [torch.float32]


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_state_it_starts_from_zero(version):
    *arguments, state = random_inputs(version, 2, 20, 2, 4)
    for backend in ("reference", "chunked"):
        y, final = operator(version, backend)(*arguments)
        y_zero, final_zero = operator(version, backend)(*arguments, torch.zeros_like(state))
        assert torch.equal(y, y_zero)
        assert torch.equal(final, final_zero)


@pytest.mark.parametrize("version", VERSIONS)
def test_only_some_gradients_and_only_some_outputs(version):
    inputs = random_inputs(version, 1, 20, 1, 4)
    inputs[0].requires_grad_()
    for output in (0, 1):
        if output == 1:
            inputs[2].requires_grad_()
        found = [operator(version, backend)(*inputs)[output].sum() for backend in ("reference", "chunked")]
        for x in inputs[0], inputs[2]:
            if x.requires_grad:
                slow, fast = (torch.autograd.grad(y, x, allow_unused=True, retain_graph=True)[0] for y in found)
                torch.testing.assert_close(fast, torch.zeros_like(x) if slow is None else slow)


@pytest.mark.parametrize("version", VERSIONS)
def test_strided_inputs_are_read_right_and_left_alone(version):
    inputs = random_inputs(version, 2, 32, 2, 8)
    wanted = values_and_gradients(operator(version, "chunked"), inputs)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    before = [x.clone() for x in strided]
    found = values_and_gradients(operator(version, "chunked"), strided)
    assert max(relative_errors(found, wanted)) < 1e-14
    assert all(map(torch.equal, strided, before))
    single = [x[:1, :, :1].contiguous() if x.ndim == 4 and x is not inputs[-1] else x for x in inputs]
    single = [x[:1] if x.ndim == 2 else x for x in single[:-1]] + [inputs[-1][:1, :1].contiguous()]
    before = [x.clone() for x in single]  # B = H = 1: a chunk is a plain view of the input
    values_and_gradients(operator(version, "chunked"), single)
    assert all(map(torch.equal, single, before))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 49), max_size=4), batch=st.integers(1, 3))
def test_carrying_the_state_over_cuts_changes_nothing(version, cuts, batch):
    *arguments, state = random_inputs(version, batch, 50, 1, 4)
    whole, final = operator(version, "chunked")(*arguments, state)
    parts = []
    bounds = [0, *sorted(set(cuts)), 50]
    for start, stop in pairwise(bounds):
        part = [x[:, start:stop] if x.ndim == 4 else x for x in arguments]
        y, state = operator(version, "auto")(*part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_unknown_backend_is_refused():
    inputs = random_inputs("wkv6", 1, 2, 1, 4)
    with pytest.raises(
        KernelError, match=r'Unknown WKV backend "triton".*auto, reference, chunked, native, exact, fla'
    ):
        ops.wkv6(*inputs, backend="triton")


@pytest.mark.parametrize("version", VERSIONS)
def test_shapes_that_do_not_fit_are_refused(version):
    inputs = random_inputs(version, 2, 3, 2, 4)
    for index in range(1, len(inputs)):
        wrong = [x[..., :2] if i == index else x for i, x in enumerate(inputs)]
        with pytest.raises(KernelError, match=r"has shape \(.*2\), expected"):
            getattr(ops, version)(*wrong)
    with pytest.raises(KernelError, match="non-empty"):
        getattr(ops, version)(*(x[:, :0] for x in inputs))
