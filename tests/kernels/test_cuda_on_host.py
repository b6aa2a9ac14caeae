"""The CUDA kernels, from the same sources, run by the host shim and held to float64 autograd over the naive loops."""

from __future__ import annotations

import ctypes
from functools import partial

import naive_wkv
import pytest
import torch
from host_kernels import EXACT, TENSOR_CORES, TENSOR_CORES_16, values_and_gradients
from naive_wkv import VERSIONS, as_starts, each_document_alone, naive, random_inputs, relative_errors

from rwkv_cluster.kernels import native, ops
from rwkv_cluster.kernels.signatures import Problem

# relative L2: y, final state, then every gradient
TOLERANCES = {
    (EXACT, torch.float32): (1e-6, 2e-6),
    (EXACT, torch.bfloat16): (2.5e-3, 2.5e-3),
    (EXACT, torch.float16): (2.5e-3, 2.5e-3),
    (TENSOR_CORES, torch.bfloat16): (6e-3, 6e-3),
}
KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"), list(TOLERANCES), ids=["exact-fp32", "exact-bf16", "exact-fp16", "tensor-cores"]
)
TOLERANCES[TENSOR_CORES_16, torch.bfloat16] = TOLERANCES[TENSOR_CORES, torch.bfloat16]
pytestmark = pytest.mark.system  # the shim takes a compiler 16 s
W = {"wkv5": 3, "wkv6": 3, "wkv7": 1}


@pytest.fixture(autouse=True)
def _one_fp32_thread_in_order(host_library: ctypes.CDLL):
    host_library.rwkv_host_schedule(0)


def representable(inputs, dtype):
    """As the kernel gets them: [B,T,H,N] in `dtype`, the rest in float32."""
    *tensors, state = inputs
    return [*(x.to(dtype if x.ndim == 4 else torch.float32).double() for x in tensors), state.float().double()]


def check(library, version, inputs, kernel, dtype, *, skip=(), starts=None):
    inputs = representable(inputs, dtype)
    operator = partial(naive, version) if starts is None else partial(each_document_alone, version, starts)
    wanted = naive_wkv.values_and_gradients(operator, inputs)
    found = values_and_gradients(library, version, inputs, dtype, kernel=kernel, starts=starts)
    errors = relative_errors(found, wanted)
    for index in skip:
        errors[index] = 0.0
    forward, backward = TOLERANCES[kernel, dtype]
    assert errors[0] < forward, errors
    assert errors[1] < 2 * forward, errors  # fp32: the decay's own rounding adds up over all steps
    assert max(errors[2:]) < backward, errors
    return found


@KERNELS
@pytest.mark.parametrize("time", [1, 15, 16, 17, 32, 33, 77])
@pytest.mark.parametrize("version", VERSIONS)
def test_any_length(host_library, version, time, kernel, dtype):
    check(host_library, version, random_inputs(version, 1, time, 2, 64), kernel, dtype)


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_batches_and_heads(host_library, version, kernel, dtype):
    check(host_library, version, random_inputs(version, 3, 18, 3, 64), kernel, dtype)


@KERNELS
@pytest.mark.parametrize("decay", ["slow", "mixed", "fast"])
@pytest.mark.parametrize("version", VERSIONS)
def test_decays(host_library, version, decay, kernel, dtype):
    inputs = random_inputs(version, 1, 130, 1, 64)
    w = inputs[W[version]]
    generator = torch.Generator().manual_seed(5)
    low, high = {"slow": (-8.0, -3.0), "mixed": (-20.0, 6.0), "fast": (0.0, 1.5)}[decay]
    if version == "wkv7" and decay == "fast":
        low, high = 6.0, 8.0  # the largest decay that still has a gradient to speak of
    inputs[W[version]] = torch.rand(w.shape, generator=generator, dtype=torch.float64) * (high - low) + low
    check(host_library, version, inputs, kernel, dtype)


@KERNELS
@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("version", VERSIONS)
def test_extreme_decays_have_finite_results_and_no_gradient(host_library, version, logit, kernel, dtype):
    inputs = random_inputs(version, 1, 40, 1, 64)
    inputs[W[version]] = torch.full_like(inputs[W[version]], logit)
    gradient = 2 + W[version]  # 0 for a decay that no longer moves, and 0 * inf in the naive loop
    found = check(host_library, version, inputs, kernel, dtype, skip=(gradient,))
    assert torch.equal(found[gradient], torch.zeros_like(found[gradient]))


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_hides_a_nan(host_library, version, kernel, dtype):
    for index, given in enumerate(random_inputs(version, 1, 20, 1, 64)):
        inputs = random_inputs(version, 1, 20, 1, 64)
        inputs[index].view(-1)[given.numel() // 4 + 3] = torch.nan
        wanted = naive_wkv.values_and_gradients(partial(naive, version), inputs)
        found = values_and_gradients(host_library, version, inputs, dtype, kernel=kernel)
        assert all(x[y.isnan()].isnan().all() for x, y in zip(found, wanted, strict=True)), index


@pytest.mark.slow
@pytest.mark.parametrize("version", ["wkv6", "wkv7"])
def test_decays_near_1_that_err_alike_at_every_step(host_library, version):
    """The exponential's error in a decay that never changes adds up: 2^-22 a step is at most 1e-3 over 4096 steps.

    The shim errs by 2 ulp, up or down by the argument's bits: in one direction for all steps of a channel. With 2^-22
    down in every channel no figure grows by more than 1e-4 either: bf16's own rounding hides it.
    """
    inputs = random_inputs(version, 1, 4096, 1, 64)
    w = inputs[W[version]]
    of_channel = torch.rand(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 13 - 20
    inputs[W[version]] = of_channel.expand(w.shape).contiguous()
    inputs = representable(inputs, torch.bfloat16)
    operator = partial(getattr(ops, version), backend="chunked")  # in float64 the naive loop within 1e-12, in less time
    wanted = naive_wkv.values_and_gradients(operator, inputs)
    found = values_and_gradients(host_library, version, inputs, torch.bfloat16, kernel=TENSOR_CORES)
    assert max(relative_errors(found, wanted)) < TOLERANCES[TENSOR_CORES, torch.bfloat16][1]


STARTS = {  # of three rows; chunks have 16 steps, and runs with fp32 maths 8
    1: {"step 0": [[0], [], [0]]},
    16: {"first and last": [[0], [15], [0, 15]]},
    53: {
        "edges": [[0, 16, 32, 48], [16], [8, 15, 17, 40]],
        "several in a chunk": [[3, 5, 9, 14, 20], [1, 7, 23, 24, 25], [30, 47, 52]],
        "every step": [range(53), range(53), [0]],
    },
}
DOCUMENTS = pytest.mark.parametrize(
    "starts",
    [
        pytest.param(as_starts(rows, time), id=f"{time}, {name}")
        for time, cases in STARTS.items()
        for name, rows in cases.items()
    ],
)


@KERNELS
@DOCUMENTS
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_know_nothing_of_each_other(host_library, version, starts, kernel, dtype):
    inputs = random_inputs(version, *starts.shape, 2, 64)
    *gradients, dstate = check(host_library, version, inputs, kernel, dtype, starts=starts)
    assert not dstate[starts[:, 0]].any()
    if version != "wkv5":  # whose one decay is that of all steps
        assert not gradients[2 + W[version]][starts].any()


@KERNELS
@pytest.mark.parametrize("quiet", [(0, 13), (13, 21), (21, 40)], ids=["first", "second", "last"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_document_is_as_exact_beside_others_with_large_values(host_library, version, quiet, kernel, dtype):
    inputs = random_inputs(version, 1, 40, 1, 64)
    size = torch.full((40, 1, 1), 10.0 if dtype == torch.float16 else 100.0, dtype=torch.float64)
    size[slice(*quiet)] = 1
    for index in (0, 2, 3) if version == "wkv7" else (0, 1, 2):
        inputs[index] = inputs[index] * size
    inputs, starts = representable(inputs, dtype), as_starts([[13, 21]], 40)
    wanted = naive_wkv.values_and_gradients(partial(each_document_alone, version, starts), inputs)
    found = values_and_gradients(host_library, version, inputs, dtype, kernel=kernel, starts=starts)
    of_document = [
        [x[:, slice(*quiet)] for x in results if x.ndim == 4 and x.shape[1] == 40] for results in (found, wanted)
    ]
    assert max(relative_errors(*of_document)) < TOLERANCES[kernel, dtype][1]


@KERNELS
@pytest.mark.parametrize("logits", [(1e4, 1e4), (-1e4, -1e4), (-20.0, 6.0)], ids=["none left", "all left", "mixed"])
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_with_extreme_decays(host_library, version, logits, kernel, dtype):
    inputs = random_inputs(version, 2, 40, 1, 64)
    w, (low, high) = inputs[W[version]], logits
    uniform = torch.rand(w.shape, generator=torch.Generator().manual_seed(5), dtype=w.dtype)
    inputs[W[version]] = uniform * (high - low) + low
    gradient = 2 + W[version]  # at the ends 0 for a decay that no longer moves, and 0 * inf in the naive loop
    starts = as_starts([[0, 3, 17, 20, 39], [7, 8, 30]], 40)
    found = check(host_library, version, inputs, kernel, dtype, skip=(gradient,) if low == high else (), starts=starts)
    assert torch.isfinite(found[gradient]).all()


@pytest.mark.parametrize("starts", [None, as_starts([[3, 5, 9, 14, 20], [16, 32]], 53)], ids=["one", "documents"])
def test_steps_16_at_a_time_where_32_are_the_rule(host_library, starts):
    inputs = random_inputs("wkv7", 2, 53, 1, 64)
    wanted = check(host_library, "wkv7", inputs, TENSOR_CORES_16, torch.bfloat16, starts=starts)
    for seed in range(1, 4):
        host_library.rwkv_host_schedule(seed)
        found = check(host_library, "wkv7", inputs, TENSOR_CORES_16, torch.bfloat16, starts=starts)
        assert all(map(torch.equal, wanted, found))


def resembling_keys(similarity):
    inputs = random_inputs("wkv7", 1, 100, 1, 64)
    kappa = torch.nn.functional.normalize(inputs[5], dim=-1)
    kappa = torch.nn.functional.normalize(similarity * kappa[:, :1] + (1 - similarity) * kappa, dim=-1)
    inputs[1], inputs[4], inputs[5] = torch.full_like(kappa, -8.0), -kappa, kappa * 0.9
    return inputs


@KERNELS
@pytest.mark.parametrize("similarity", [0.9, 1.0])
def test_correlated_and_identical_keys(host_library, similarity, kernel, dtype):
    check(host_library, "wkv7", resembling_keys(similarity), kernel, dtype)


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_large_values(host_library, version, kernel, dtype):
    inputs = random_inputs(version, 1, 50, 1, 64)
    receptance, key, value = (0, 2, 3) if version == "wkv7" else (0, 1, 2)
    for index in (receptance, key, value):
        inputs[index] = inputs[index] * (4 if dtype == torch.float16 else 30)  # fp16 ends at 65504
    check(host_library, version, inputs, kernel, dtype)


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("starts", [None, as_starts([[5, 19, 20, 48]], 50)], ids=["one document", "documents"])
def test_every_schedule_gives_the_same_bits(host_library, version, starts, kernel, dtype):
    inputs = representable(random_inputs(version, 1, 50, 1, 64), dtype)
    results = []
    for seed in range(6):
        host_library.rwkv_host_schedule(seed)
        results.append(values_and_gradients(host_library, version, inputs, dtype, kernel=kernel, starts=starts))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_null_pointers_count_as_zeros(host_library, version, kernel, dtype):
    *tensors, state = representable(random_inputs(version, 1, 20, 1, 64), dtype)
    zeros = [*tensors, torch.zeros_like(state)]
    dy = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    no_dy = torch.zeros_like(dy)
    for given, nothing in (((dy, torch.zeros_like(state)), (dy, None)), ((no_dy, state), (None, state))):
        wanted = values_and_gradients(host_library, version, zeros, dtype, kernel=kernel, gradients=given)
        found = values_and_gradients(host_library, version, [*tensors, None], dtype, kernel=kernel, gradients=nothing)
        assert all(map(torch.equal, wanted, found))


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_starts_without_a_start_change_no_bit(host_library, version, kernel, dtype):
    inputs = representable(random_inputs(version, 2, 33, 1, 64), dtype)
    wanted, found = (
        values_and_gradients(host_library, version, inputs, dtype, kernel=kernel, starts=starts)
        for starts in (None, as_starts([[], []], 33))
    )
    assert all(map(torch.equal, wanted, found))


OTHER_SIZES = pytest.mark.parametrize("size", [32, 128])


@OTHER_SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("time", [1, 2, 16, 17, 45])
@pytest.mark.parametrize("version", VERSIONS)
def test_other_head_sizes_with_fp32_maths(host_library, version, time, dtype, size):
    check(host_library, version, random_inputs(version, 2, time, 2, size), EXACT, dtype)


@OTHER_SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@DOCUMENTS
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_in_other_head_sizes(host_library, version, starts, dtype, size):
    inputs = random_inputs(version, *starts.shape, 1, size)
    *_, dstate = check(host_library, version, inputs, EXACT, dtype, starts=starts)
    assert not dstate[starts[:, 0]].any()


@OTHER_SIZES
@pytest.mark.parametrize("version", VERSIONS)
def test_every_schedule_gives_the_same_bits_in_other_head_sizes(host_library, version, size):
    inputs, starts = random_inputs(version, 1, 37, 1, size), as_starts([[5, 19, 20]], 37)
    results = []
    for seed in range(4):
        host_library.rwkv_host_schedule(seed)
        results.append(values_and_gradients(host_library, version, inputs, starts=starts))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("kernel", "size"), [(EXACT, 32), (EXACT, 64), (EXACT, 128), (TENSOR_CORES, 64), (TENSOR_CORES_16, 64)]
)
@pytest.mark.parametrize("version", [6, 7])
def test_python_and_the_library_agree_on_what_is_saved(host_library, version, kernel, size):
    for time in (1, 16, 17):
        problem = Problem(batch=3, time=time, heads=2, size=size, io=1, kernel=kernel)
        found = host_library.rwkv_saved_bytes(version, ctypes.byref(problem))
        assert found == native.saved_bytes(version, (3, time, 2, size), kernel)


def test_what_has_no_kernel_is_refused(host_library):
    problems = [(1, Problem(1, 1, 1, 48, 1)), (1, Problem(1, 1, 1, 32, 1, TENSOR_CORES)),
                (1, Problem(1, 1, 1, 128, 1, TENSOR_CORES)), (2, Problem(1, 1, 1, 64, 0, TENSOR_CORES)),
                (3, Problem(1, 1, 1, 64, 1, 7))]  # fmt: skip
    for status, problem in problems:
        found = host_library.rwkv_wkv7_forward(ctypes.byref(problem), *[None] * 10)
        assert found == status
        assert host_library.rwkv_status_text(found).startswith(b"no ")
