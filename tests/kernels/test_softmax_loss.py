"""The loss over a chunk of logits, from the CUDA sources: value and gradient against float64, and head_loss on it."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader, softmax_loss
from rwkv_cluster.model import loss as loss_module
from rwkv_cluster.model.loss import head_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LOSS = 2e-6
"""Tolerance of a row's loss, relative to the larger of 1 and the spread of its logits: the sum is in fp32."""
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding to the dtype."""
FP32, DISTANCE = 1e-6, 1.5e-7
"""Relative tolerance of each part of an element of the gradient, which are computed in fp32, and what is added to it
for each unit between a logit and its row's largest: their difference is rounded."""
SMALLEST = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 6.0e-8}
"""Below it an element may be rounded to 0 or to a subnormal number."""


def kernel(handle: ctypes.CDLL) -> loader.Library:
    return loader.Library(handle, Path("host"), "host")


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the sources run: by the host shim on a CPU, or on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return "cpu" if request.param == "host" else "cuda"


@pytest.fixture
def library(device: str, request: pytest.FixtureRequest) -> loader.Library:
    if device == "cpu":
        handle = request.getfixturevalue("host_library")
        handle.rwkv_host_schedule(0)
        return kernel(handle)
    found = softmax_loss.library_for(torch.empty(1, device=device))
    assert found is not None
    return found


def float64(logits: Tensor, targets: Tensor, l2wrap: float) -> tuple[Tensor, list[Tensor]]:
    """Loss of each row [m], and what the gradient [m,V] is the sum of: probabilities, -1 at the target, L2Wrap."""
    rows = torch.arange(len(logits))
    probabilities, hits, wrap = torch.softmax(logits, -1), torch.zeros_like(logits), torch.zeros_like(logits)
    hits[rows, targets] = -1
    for row, values in enumerate(logits):
        wrap[row, values.tolist().index(values.max().item())] = l2wrap * values.max()
    return torch.logsumexp(logits, -1) - logits[rows, targets], [probabilities, hits, wrap]


def check(library: loader.Library, logits: Tensor, targets: Tensor, l2wrap: float) -> Tensor:
    """Hold the loss and the gradient that takes the logits' place to float64; returns the gradient."""
    dtype, kept, exact = logits.dtype, logits.clone(), logits.double().cpu()
    rows, parts = float64(exact, targets.cpu(), l2wrap)
    losses = [softmax_loss.softmax_loss(library, logits, targets, l2wrap, gradient=False) for _ in range(2)]
    assert torch.equal(logits, kept)
    losses.append(softmax_loss.softmax_loss(library, logits, targets, l2wrap, gradient=True))
    assert losses[0].dtype == torch.float32
    assert losses[0] == losses[1] == losses[2]
    spread = (exact.amax(-1) - exact.amin(-1)).clamp(min=1).sum()
    assert abs(losses[0].item() - rows.sum()) <= LOSS * spread
    wanted, sizes = sum(parts), sum(part.abs() for part in parts)
    below = exact.amax(-1, keepdim=True) - exact
    tolerance = ROUNDING[dtype] * wanted.abs() + (FP32 + DISTANCE * below) * sizes + SMALLEST[dtype]
    assert ((logits.double().cpu() - wanted).abs() <= tolerance).all()
    return logits


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str, stride: int = 0, offset: int = 0):
    generator = torch.Generator().manual_seed(rows * vocabulary)
    stride = stride or vocabulary
    whole = (3 * torch.randn(offset + rows * stride, generator=generator)).to(dtype).to(device)
    logits = whole[offset:].view(rows, stride)[:, :vocabulary]
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    return whole, logits, targets


pytestmark = pytest.mark.system  # the shim takes a compiler 16 s


@DTYPES
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 17, 256, 4095, 16384, 50277, 65536])
def test_value_and_gradient(library, device, vocabulary, l2wrap, dtype):
    _, logits, targets = random_logits(3, vocabulary, dtype, device)
    targets[0], targets[1] = 0, vocabulary - 1
    check(library, logits, targets, l2wrap)


@DTYPES
@pytest.mark.parametrize(("stride", "offset"), [(40, 0), (37, 1), (41, 3), (48, 7)])
def test_rows_at_any_address_leave_what_lies_between_alone(library, device, stride, offset, dtype):
    whole, logits, targets = random_logits(6, 37, dtype, device, stride, offset)
    kept = whole.clone()
    check(library, logits, targets, 1e-4)
    between = torch.ones(len(whole), dtype=torch.bool)
    between[offset:].view(6, stride)[:, :37] = False
    assert torch.equal(whole.cpu()[between], kept.cpu()[between])
    assert not torch.equal(whole, kept)


def test_a_vocabulary_of_2_to_the_20(library, device):
    _, logits, targets = random_logits(1, 1 << 20, torch.bfloat16, device)
    check(library, logits, targets, 1e-4)


@DTYPES
@pytest.mark.parametrize("places", [(5, 9), (0, 19999), (4097, 8193), (16391, 3), (513, 512), range(700)], ids=str)
def test_l2wrap_goes_to_the_first_of_equal_maxima(library, device, places, dtype):
    _, logits, targets = random_logits(1, 20_000, dtype, device)
    logits[0, list(places)] = 40.0
    targets[0] = 77
    gradient = check(library, logits, targets, 0.25)[0]
    first = min(places)
    assert gradient[first].item() == pytest.approx(10 + 1 / len(places), rel=5e-3)
    assert gradient.sum().item() == pytest.approx(10, rel=2e-2)


@DTYPES
@pytest.mark.parametrize("size", [3e4, 1e30])
def test_huge_logits(library, device, size, dtype):
    size = min(size, torch.finfo(dtype).max)  # fp16 ends at 65504
    rows = [[size, -size, 0.0], [-size, -size, -size], [size, size, -size], [0.0, -size, -size / 2]]
    logits = torch.tensor(rows, dtype=torch.float64).to(dtype).to(device)
    targets = torch.tensor([1, 0, 1, 0]).to(device)
    check(library, logits, targets, 0.0)


@DTYPES
def test_what_is_no_number(library, device, dtype):
    """NaN and infinity give NaN, in their row; minus infinity counts as probability 0."""
    for value, place in ((math.nan, 0), (math.nan, 299), (math.nan, None), (math.inf, 17)):
        _, logits, targets = random_logits(2, 300, dtype, device)
        logits[0, slice(None) if place is None else place] = value
        wanted = check(library, logits[1:].clone(), targets[1:], 0.1)
        assert softmax_loss.softmax_loss(library, logits, targets, 0.1, gradient=True).isnan()
        assert logits[0].isnan().all()
        assert torch.equal(logits[1:], wanted)
    _, logits, targets = random_logits(1, 300, dtype, device)
    logits[0, 20:] = -math.inf
    targets[0] = 3
    shorter = logits[:, :20].clone()
    check(library, shorter, targets, 0.1)
    assert softmax_loss.softmax_loss(library, logits, targets, 0.1, gradient=True).isfinite()
    torch.testing.assert_close(logits[:, :20], shorter, rtol=1e-2, atol=1e-6)
    assert not logits[:, 20:].any()


@pytest.mark.parametrize("target", [-1, 300, -(1 << 40), 1 << 40])
def test_a_target_outside_the_vocabulary_gives_nan_and_reads_nothing(library, device, target):
    _, logits, targets = random_logits(2, 300, torch.float32, device)
    targets[0] = target
    assert softmax_loss.softmax_loss(library, logits, targets, 0.1, gradient=True).isnan()
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


def test_no_rows_are_no_loss(library, device):
    logits = torch.empty(0, 7, device=device)
    assert softmax_loss.softmax_loss(library, logits, torch.empty(0, dtype=torch.int64), 0.1, gradient=True) == 0


def test_every_schedule_gives_the_same_bits(host_library):
    results = []
    for seed in range(5):
        host_library.rwkv_host_schedule(seed)
        _, logits, targets = random_logits(2, 9001, torch.bfloat16, "cpu", offset=3)
        loss = softmax_loss.softmax_loss(kernel(host_library), logits, targets, 1e-4, gradient=True)
        results.append((loss, logits))
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_what_has_no_kernel_is_refused(library, device):
    empty, targets = torch.empty(1, 0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(KernelError, match=r"rwkv_softmax_loss of .* \(1, 0\) on .*: no kernel for this size"):
        softmax_loss.softmax_loss(library, empty, targets, 0.0, gradient=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_that_pytorch_keeps(dtype):
    """Those of a CPU, whose training does not change, and float64."""
    assert softmax_loss.library_for(torch.empty(1, dtype=dtype)) is None


@DTYPES
@pytest.mark.parametrize("chunk_rows", [None, 1, 8, 37])
@pytest.mark.parametrize("needs", ["both", "hidden", "weight", "none"])
def test_head_loss_on_the_kernel(library, device, needs, chunk_rows, dtype, monkeypatch):
    """Loss and gradients of the whole, in any number of chunks, against float64 autograd."""
    served = []

    def library_for(hidden):
        served.append(hidden.dtype)
        return library

    monkeypatch.setattr(softmax_loss, "library_for", library_for)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 12, generator=generator).to(dtype)
    weight = torch.randn(29, 12, generator=generator).to(dtype).float()
    targets = torch.randint(0, 29, (37,), generator=generator)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    wanted = torch.nn.functional.cross_entropy(logits, targets)
    total = 3 * (wanted + 0.5 * 0.1 * logits.max(dim=-1).values.square().mean())
    wanted_gradients = dict(zip(("hidden", "weight"), torch.autograd.grad(total, exact), strict=True))
    leaves = {"hidden": hidden.to(device), "weight": weight.to(device)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(needs in ("both", name))
    found = head_loss(leaves["hidden"], leaves["weight"], targets.to(device), 0.1, chunk_rows)
    assert served == [dtype]
    assert found.dtype == torch.float32
    bound = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]  # the logits' own rounding
    assert found.item() == pytest.approx(wanted.item(), rel=bound)
    if needs == "none":
        assert not found.requires_grad
        return
    (3 * found).backward()
    for name, leaf in leaves.items():
        if needs not in ("both", name):
            assert leaf.grad is None
            continue
        gradient, exactly = leaf.grad.double().cpu(), wanted_gradients[name]
        error = (gradient - exactly).norm() / exactly.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype], (name, error)


def test_the_plain_form_agrees(library, device):
    """The reference in PyTorch, chunk by chunk: same contract, on the same logits."""
    _, logits, targets = random_logits(16, 3000, torch.float32, device)
    loss, gradient = loss_module._softmax_loss(logits, targets, 1e-4, torch.float32)
    found = softmax_loss.softmax_loss(library, logits, targets, 1e-4, gradient=True)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, gradient, rtol=2e-5, atol=1e-9)
