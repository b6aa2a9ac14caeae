"""The kernels on a GPU: results, streams, graphs and the compiler. What a CPU can show is in test_cuda_on_host.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fused_passes import LIMITS, NATIVE, SHAPES, SHIFTED, arguments, errors_of
from fused_passes import run as run_pass
from naive_wkv import (
    VERSIONS,
    each_document_alone,
    naive,
    output_gradients,
    random_inputs,
    relative_errors,
    values_and_gradients,
)

from rwkv_cluster.kernels import native, ops, reference

pytestmark = pytest.mark.gpu
SUPPORT = Path(__file__).parents[1] / "support"
TOLERANCES = {
    ("exact", torch.float32): (2e-6, 5e-5),
    ("exact", torch.bfloat16): (2.5e-3, 2.5e-3),
    ("exact", torch.float16): (2.5e-3, 2.5e-3),
    ("native", torch.bfloat16): (6e-3, 6e-3),
}
SAME_DECAY = 1.5e-5
"""For RWKV-5 in fp32 over 512 steps and more, forward.

Its decay d = exp(-exp(w)) is the same at every step, so an error of d is too, and what was written n steps ago carries
n times its relative error; decays that change with the step err in both directions, and stay under 2e-6. CUDA's expf
errs by up to 2 ulp, twice: with exp(w) two ulp too large and then d two too small in every channel, the recurrence in
float64 differs by 8.7e-6 in y and 1.33e-5 in the state at T 512, by 1.13e-5 and 1.24e-5 at T 4096, and by 1.1e-6 and
1.7e-6 at T 33. The sums' own rounding is 2e-7.
"""

KERNELS = pytest.mark.parametrize(("backend", "dtype"), list(TOLERANCES), ids=str)


@pytest.fixture(autouse=True)
def _needs_a_gpu_and_a_library() -> Iterator[None]:
    """NaN in uninitialised memory: an element that no kernel writes, or that one reads too early, shows."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    assert native.unavailable("cuda", torch.bfloat16, 64) is None
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operator(version: str, backend: str):
    return partial(getattr(ops, version), backend=backend)


def on_gpu(inputs, dtype, device="cuda"):
    *tensors, state = inputs
    return [*(x.to(device, dtype if x.ndim == 4 else torch.float32) for x in tensors), state.float().to(device)]


def definition(version: str, time: int, starts: torch.Tensor | None):
    """The naive loop; for many steps, where that takes minutes, the loop in PyTorch, which is itself held to it."""
    if time > 64:
        return partial(getattr(reference, version), starts=starts)
    return partial(naive, version) if starts is None else partial(each_document_alone, version, starts)


def run(version, backend, inputs, dtype, device="cuda", starts=None):
    """y, final state and gradients on the device, beside float64 of the same rounded inputs."""
    given = on_gpu(inputs, dtype, device)
    rounded = [x.double().cpu() for x in given]
    wanted = values_and_gradients(definition(version, inputs[0].shape[1], starts), rounded)
    leaves = [x.requires_grad_() for x in given]
    starts = None if starts is None else starts.to(device)
    y, state = operator(version, backend)(*leaves, starts=starts)
    dy, dstate = (x.to(device) for x in output_gradients(rounded))
    found = [y, state, *torch.autograd.grad((y, state), leaves, (dy.to(y), dstate.to(state)))]
    return [x.detach().cpu() for x in found], wanted


@KERNELS
@pytest.mark.parametrize("shape", [(2, 16, 2), (3, 33, 5), (1, 512, 3), (1, 4096, 1)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_against_float64(version, shape, backend, dtype):
    found, wanted = run(version, backend, random_inputs(version, *shape, 64), dtype)
    errors = relative_errors(found, wanted)
    forward, backward = TOLERANCES[backend, dtype]
    if version == "wkv5" and shape[1] >= 512 and dtype == torch.float32:
        forward = SAME_DECAY
    assert max(errors[:2]) < forward, errors
    assert max(errors[2:]) < backward, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_starts", [False, True])
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("version", VERSIONS)
def test_other_head_sizes(version, size, has_starts, dtype):
    starts = torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) < 0.1 if has_starts else None
    found, wanted = run(version, "native", random_inputs(version, 2, 53, 3, size), dtype, starts=starts)
    errors = relative_errors(found, wanted)
    forward, backward = TOLERANCES["exact", dtype]
    assert max(errors[:2]) < forward, errors
    assert max(errors[2:]) < backward, errors


@KERNELS
@pytest.mark.parametrize("shape", [(3, 53, 5), (1, 2048, 2)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_know_nothing_of_each_other(version, shape, backend, dtype):
    batch, time, _ = shape
    starts = torch.rand(batch, time, generator=torch.Generator().manual_seed(1)) < 0.1
    starts[0, 0] = starts[-1, -1] = True
    found, wanted = run(version, backend, random_inputs(version, *shape, 64), dtype, starts=starts)
    errors = relative_errors(found, wanted)
    forward, backward = TOLERANCES[backend, dtype]
    assert max(errors[:2]) < forward, errors
    assert max(errors[2:]) < backward, errors
    assert not found[-1][0].any()  # the gradient of a state that a document's start hides


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_twice_the_same_bits(version, backend, dtype):
    inputs = random_inputs(version, 2, 100, 3, 64)
    first, second = (run(version, backend, inputs, dtype)[0] for _ in range(2))
    assert all(map(torch.equal, first, second))


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_the_current_stream_is_used(version, backend, dtype):
    given = on_gpu(random_inputs(version, 2, 200, 4, 64), dtype)
    wanted, _ = operator(version, backend)(*given)
    found, _ = on_a_late_stream(lambda late: operator(version, backend)(*late), given)
    assert torch.equal(found, wanted)


def on_a_late_stream(function, given):
    """function(given) on a stream on which the inputs arrive late: on another one it would read zeros."""
    late = [torch.zeros_like(x) for x in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(late, given, strict=True):
            x.copy_(value)
        result = function(late)
    torch.cuda.synchronize()
    return result


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_a_cuda_graph_holds_forward_and_backward(version, backend, dtype):
    leaves = [x.requires_grad_() for x in on_gpu(random_inputs(version, 2, 64, 2, 64), dtype)]

    def step():
        y, state = operator(version, backend)(*leaves)
        return torch.autograd.grad((y, state), leaves, (torch.ones_like(y), torch.ones_like(state)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))


@KERNELS
@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_into_one_graph(version, backend, dtype):
    leaves = [x.requires_grad_() for x in on_gpu(random_inputs(version, 1, 32, 2, 64), dtype)]

    def step(*x):
        y, state = operator(version, backend)(*x)
        return torch.tanh(y), state

    found = torch.compile(step, fullgraph=True)(*leaves)[0]
    torch.testing.assert_close(found, step(*leaves)[0])


@pytest.mark.parametrize("version", ["wkv6", "wkv7"])
def test_opcheck(version):
    given = [x.requires_grad_() for x in on_gpu(random_inputs(version, 1, 20, 2, 64), torch.bfloat16)]
    starts = torch.arange(20, device="cuda")[None] % 7 == 0
    for given_starts in (None, starts):
        operands = [*given, given_starts, False, True]
        torch.library.opcheck(getattr(torch.ops.rwkv_cluster, version).default, operands)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_first():
    inputs = random_inputs("wkv7", 2, 40, 2, 64)
    first, second = (run("wkv7", "native", inputs, torch.bfloat16, device)[0] for device in ("cuda:0", "cuda:1"))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 17, 9, 32), (3, 1000, 12, 64), (1, 5, 2, 128)], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_the_passes_of_a_block(name, shape, dtype):
    for documents in (False, True) if name in SHIFTED else (False,):
        errors = errors_of(name, shape, dtype, device="cuda", documents=documents)
        assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 6])
@pytest.mark.parametrize("width", [1040, 2560])
def test_the_widest_norms(width, count, dtype):
    """Of several warps, and of all that a block may have; with fp32 and six mixes most of its shared memory."""
    errors = errors_of("norm_mix", (2, 40, 1, width), dtype, device="cuda", documents=True, count=count)
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize("name", NATIVE)
def test_the_passes_give_the_same_bits_twice_and_on_any_stream(name):
    tensors, _ = arguments(name, (2, 700, 12, 64))
    given = [x.to("cuda", torch.bfloat16) for x in tensors]
    wanted = run_pass(name, given, 64, "native")
    found = on_a_late_stream(lambda late: run_pass(name, late, 64, "native"), given)
    assert all(map(torch.equal, found, wanted))


SANITIZED = """
import torch
from fused_passes import NATIVE, errors_of
from naive_wkv import VERSIONS, random_inputs
from rwkv_cluster.kernels import ops, softmax_loss

for name in NATIVE:
    errors_of(name, (1, 67, 9, 32), torch.bfloat16, device="cuda", documents=True)
errors_of("norm_mix", (1, 19, 1, 2560), torch.float32, device="cuda", documents=True)

documents = torch.arange(37, device="cuda")[None] % 9 == 0
for version in VERSIONS:
    for backend, size in (("native", 64), ("exact", 64), ("exact", 32), ("exact", 128)):
        for starts in (None, documents):
            *tensors, state = random_inputs(version, 1, 37, 2, size)
            leaves = [x.to("cuda", torch.bfloat16 if x.ndim == 4 else torch.float32).requires_grad_() for x in tensors]
            y, final = getattr(ops, version)(*leaves, state.float().cuda(), starts=starts, backend=backend)
            torch.autograd.grad((y, final), leaves, (torch.ones_like(y), torch.ones_like(final)))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = torch.randn(3, 5003, device="cuda", dtype=dtype)
    library, targets = softmax_loss.library_for(logits), torch.tensor([0, 7, 5002], device="cuda")
    softmax_loss.softmax_loss(library, logits, targets, 1e-4, gradient=True)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool, tmp_path):
    """Without initcheck, which knows nothing of what torch's own kernels have written while only ours are watched.

    Each tensor has its own allocation, so that one byte behind it counts. What torch asks the driver does not, for some
    of the answers are errors.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "all_kernels.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(SUPPORT)!r})\n{SANITIZED}")
    options = ["--error-exitcode", "9", "--kernel-name", "kns=rwkv", "--report-api-errors", "no"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, *options, sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
