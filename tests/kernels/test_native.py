"""The custom operators around the compiled kernels: autograd, dtypes, torch.compile, and the choice of a backend."""

from __future__ import annotations

import ctypes
import logging
from functools import partial

import host_kernels
import pytest
import torch
from naive_wkv import VERSIONS, naive, random_inputs, relative_errors, values_and_gradients

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader, native, ops, reference
from rwkv_cluster.kernels.chunked import wkv as chunked
from rwkv_cluster.kernels.signatures import Problem


def operator(version: str, backend: str):
    return partial(getattr(ops, version), backend=backend)


def packed(
    version: str, dtype: torch.dtype, *, state: bool = True, grad: bool = True, starts: torch.Tensor | None = None
) -> list:
    """Arguments of the custom operator below the door."""
    *tensors, initial = random_inputs(version, 2, 19, 2, 8)
    tensors = [x.to(torch.float32 if x.ndim == 2 else dtype) for x in tensors]
    leaves = [x.requires_grad_(grad) for x in (*tensors, initial.float())]
    return [*leaves[:-1], leaves[-1] if state else None, starts, False, grad]


@pytest.mark.parametrize("shape", [(2, 1, 2, 4), (1, 15, 1, 20), (2, 33, 3, 64), (1, 77, 1, 128)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_and_every_gradient(version, shape):
    inputs = [x.float().double() for x in random_inputs(version, *shape)]
    wanted = values_and_gradients(partial(naive, version), inputs)
    errors = relative_errors(values_and_gradients(operator(version, "native"), inputs, torch.float32), wanted)
    assert max(errors[:2]) < 1e-6
    assert max(errors[2:]) < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_rounds_only_inputs_and_outputs(version, dtype):
    *inputs, state = (x.to(dtype).double() for x in random_inputs(version, 2, 21, 4, 32))
    wanted = values_and_gradients(partial(naive, version), [*inputs, state])
    found = values_and_gradients(
        lambda *x: operator(version, "native")(*x[:-1], x[-1].float()), [*inputs, state], dtype
    )
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * (len(inputs) + 1)]
    assert max(relative_errors(found, wanted)) < 2.5e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_inputs_of_other_dtypes_are_rounded_and_not_misread(version):
    r, *others = (x.bfloat16() for x in random_inputs(version, 1, 9, 2, 16))
    found = operator(version, "native")(r, *(x.float() for x in others))
    wanted = operator(version, "native")(r, *others)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("target", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_instruction_set(version, dtype, target):
    library = loader.cpu()
    assert isinstance(library, loader.Library), library
    if library.handle.rwkv_select_target(target.encode()):
        pytest.skip(f"this processor has no {target}")
    try:
        *inputs, state = random_inputs(version, 1, 37, 2, 64)
        inputs = [*(x.to(dtype if x.ndim == 4 else torch.float32).double() for x in inputs), state.float().double()]
        wanted = values_and_gradients(partial(naive, version), inputs)
        errors = relative_errors(host_kernels.values_and_gradients(library.handle, version, inputs, dtype), wanted)
    finally:
        library.handle.rwkv_select_target(library.target.encode())
    assert max(errors) < (2e-6 if dtype == torch.float32 else 2.5e-3)


@pytest.mark.parametrize("decay", ["mixed", "slowest", "fast", "infinite"])
@pytest.mark.parametrize("version", VERSIONS)
def test_any_decay(version, decay):
    inputs = random_inputs(version, 1, 130, 2, 16)
    index = 1 if version == "wkv7" else 3
    w = inputs[index]
    generator = torch.Generator().manual_seed(5)
    inputs[index] = {
        "mixed": torch.rand(w.shape, generator=generator, dtype=torch.float64) * 26 - 20,
        "slowest": torch.full_like(w, -20.0),
        "fast": torch.full_like(w, 2.5),
        "infinite": torch.full_like(w, 1000.0),
    }[decay]
    inputs = [x.float().double() for x in inputs]
    wanted = values_and_gradients(partial(naive, version), inputs)
    found = values_and_gradients(operator(version, "native"), inputs, torch.float32)
    errors = relative_errors(found, wanted)
    if decay == "infinite":  # the naive gradient of w is 0 * inf; the true one is 0
        assert torch.equal(found[2 + index], torch.zeros_like(found[2 + index]))
        errors[2 + index] = 0.0
    assert errors[0] < 1e-6
    assert max(errors[1:]) < 5e-5


@pytest.mark.parametrize("similarity", [0.9, 1.0])
def test_correlated_and_identical_keys(similarity):
    inputs = random_inputs("wkv7", 1, 100, 1, 64)
    kappa = torch.nn.functional.normalize(inputs[5], dim=-1)
    kappa = torch.nn.functional.normalize(similarity * kappa[:, :1] + (1 - similarity) * kappa, dim=-1)
    inputs[1], inputs[4], inputs[5] = torch.full_like(kappa, -8.0), -kappa, kappa
    inputs = [x.float().double() for x in inputs]
    wanted = values_and_gradients(partial(naive, "wkv7"), inputs)
    errors = relative_errors(values_and_gradients(operator("wkv7", "native"), inputs, torch.float32), wanted)
    assert max(errors) < 2e-6


@pytest.mark.parametrize("version", VERSIONS)
def test_only_some_gradients_and_only_some_outputs(version):
    inputs = [x.float() for x in random_inputs(version, 1, 20, 1, 4)]
    inputs[0].requires_grad_()
    inputs[2].requires_grad_()
    for output in (0, 1):
        slow, fast = (
            torch.autograd.grad(operator(version, backend)(*inputs)[output].sum(), inputs[2])[0]
            for backend in ("chunked", "native")
        )
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_state_it_starts_from_zero(version):
    *arguments, state = (x.float() for x in random_inputs(version, 2, 20, 2, 4))
    for found, wanted in zip(
        operator(version, "native")(*arguments),
        operator(version, "native")(*arguments, torch.zeros_like(state)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("version", VERSIONS)
def test_strided_inputs_are_read_right_and_left_alone(version):
    inputs = [x.float() for x in random_inputs(version, 2, 32, 2, 8)]
    wanted = values_and_gradients(operator(version, "native"), inputs, torch.float32)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    before = [x.clone() for x in strided]
    found = values_and_gradients(operator(version, "native"), strided, torch.float32)
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, strided, before))


@pytest.mark.parametrize("version", VERSIONS)
def test_any_number_of_threads_gives_the_same_bits(version):
    inputs = [x.float() for x in random_inputs(version, 3, 40, 3, 8)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(values_and_gradients(operator(version, "native"), inputs, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.system
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", ["wkv6", "wkv7"])
def test_opcheck(version, dtype, state):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(torch.ops.rwkv_cluster, version).default
    starts = torch.zeros(2, 19, dtype=torch.bool)
    starts[:, ::5] = True
    torch.library.opcheck(op, packed(version, dtype, state=state), test_utils=tests)
    torch.library.opcheck(op, packed(version, dtype, state=state, starts=starts), test_utils=tests)
    torch.library.opcheck(op, packed(version, dtype, state=state, grad=False), test_utils=tests)


@pytest.mark.system
@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_into_one_graph(version):
    inputs = [x.float() for x in random_inputs(version, 1, 20, 2, 8)]

    starts = torch.arange(20).unsqueeze(0) % 7 == 3

    def step(*leaves):
        y, state = operator(version, "auto")(*leaves, starts=starts)
        return torch.tanh(y), state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = values_and_gradients(compiled, inputs, torch.float32)
    assert all(map(torch.equal, found, values_and_gradients(step, inputs, torch.float32)))


def test_nothing_is_kept_when_no_backward_follows():
    inputs = [x.float() for x in random_inputs("wkv7", 1, 20, 1, 4)]
    with torch.no_grad():
        assert torch.ops.rwkv_cluster.wkv7(*inputs, None, False, False)[2].numel() == 0


@pytest.mark.parametrize("time", [1, 16, 17])
@pytest.mark.parametrize("version", [6, 7])
def test_the_library_agrees_on_what_it_keeps(version, time):
    library = loader.cpu()
    assert isinstance(library, loader.Library), library
    problem = Problem(batch=3, time=time, heads=2, size=20, io=0, kernel=0, threads=1)
    found = library.handle.rwkv_saved_bytes(version, ctypes.byref(problem))
    assert found == native.saved_bytes(version, (3, time, 2, 20), native.EXACT)


@pytest.mark.parametrize("version", VERSIONS)
def test_auto_takes_the_compiled_kernel_but_for_a_few_tokens_and_float64(version):
    inputs = [x.float() for x in random_inputs(version, 1, 20, 1, 4)]
    auto, compiled = operator(version, "auto")(*inputs), operator(version, "native")(*inputs)
    assert torch.equal(auto[0], compiled[0])
    doubles = [x.double() for x in inputs]
    assert torch.equal(operator(version, "auto")(*doubles)[0], getattr(chunked, version)(*doubles)[0])
    few = [x[:, :4] if x.ndim == 4 and x is not inputs[-1] else x for x in inputs]
    assert torch.equal(operator(version, "auto")(*few)[0], getattr(reference, version)(*few)[0])


def test_without_a_library_auto_says_why_once_and_the_others_refuse(monkeypatch, caplog):
    reason = "There is no CPU library here. Run `build`."
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("There is no CPU library here", "Run `build`"))
    ops._tell.cache_clear()
    inputs = [x.float() for x in random_inputs("wkv7", 1, 20, 1, 4)]
    with caplog.at_level(logging.WARNING, "rwkv_cluster"):
        for _ in range(2):
            y, _ = ops.wkv7(*inputs)
    assert torch.equal(y, chunked.wkv7(*inputs)[0])
    (message,) = caplog.messages
    assert message.startswith(f"{reason} ")
    assert message.endswith("in chunked form.")
    ops._tell.cache_clear()
    for backend in ("native", "exact"):
        with pytest.raises(KernelError, match=r"no CPU library here.*wkv_backend .* needs a compiled kernel"):
            ops.wkv7(*inputs, backend=backend)


def test_what_no_kernel_takes_is_refused_in_a_sentence():
    inputs = random_inputs("wkv6", 1, 20, 1, 4)
    with pytest.raises(KernelError, match=r"take float32, bfloat16 and float16, not float64\."):
        ops.wkv6(*inputs, backend="native")
    assert '"cpu" and "cuda", not on "meta"' in native.unavailable("meta", torch.float32, 64)
    assert "CUDA kernels have head sizes 32, 64 and 128, not 48." in native.unavailable("cuda", torch.float32, 48)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernels_get_addresses_they_can_read_16_bytes_at(version, monkeypatch):
    """A view that begins anywhere is contiguous too."""
    given = []
    call = native._call
    monkeypatch.setattr(native, "_call", lambda *arguments: given.append(arguments[3:]) or call(*arguments))
    *tensors, state = (x.float() for x in random_inputs(version, 1, 20, 2, 64))
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape).requires_grad_() for x in tensors]
    assert all(x.data_ptr() % 16 for x in shifted)
    assert all(x.is_contiguous() for x in shifted)
    y, final = operator(version, "native")(*shifted, state)
    torch.autograd.grad((y, final), shifted, (torch.ones_like(y), torch.ones_like(final)))
    assert len(given) == 2
    for inputs, *others in given:
        assert all(x.data_ptr() % 16 == 0 for x in (*inputs, *others) if x is not None)
    assert torch.equal(y, operator(version, "native")(*tensors, state)[0])
