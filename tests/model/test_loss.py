"""head_loss against plain autograd: value, both gradients, L2Wrap, chunks, precision."""

import math

import pytest
import torch
from tiny_models import relative_error

from rwkv_cluster.model import layers
from rwkv_cluster.model import loss as loss_module
from rwkv_cluster.model.loss import head_loss

M, C, V = 37, 12, 29


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (M,), generator=generator)


def plain(hidden, weight, targets, l2wrap):
    """Cross entropy and, as a loss of its own, the function whose gradient L2Wrap is."""
    logits = hidden @ weight.t()
    entropy = torch.nn.functional.cross_entropy(logits, targets)
    return entropy, entropy + 0.5 * l2wrap * logits.max(dim=-1).values.square().mean()


@pytest.mark.parametrize("chunk_rows", [None, 1, 8, 36, 37, 1000])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 0.3])
def test_value_and_gradients_equal_plain_autograd(chunk_rows, l2wrap):
    hidden, weight, targets = inputs()
    value, total = plain(hidden, weight, targets, l2wrap)
    wanted = torch.autograd.grad(total * 7, (hidden, weight))
    found = head_loss(hidden, weight, targets, l2wrap, chunk_rows)
    grads = torch.autograd.grad(found * 7, (hidden, weight))  # the upstream gradient scales L2Wrap too
    assert abs((found - value).item()) < 1e-13
    for grad, want in zip(grads, wanted, strict=True):
        assert relative_error(grad, want) < 1e-12


def test_fp32_matches_float64():
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, targets = inputs(dtype)
        loss = head_loss(hidden, weight, targets, 1e-4, 8)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found.double(), wanted) < 1e-5


def test_bf16_hidden_on_fp32_weight():
    hidden, weight, targets = inputs(torch.float32)
    value, total = plain(hidden, weight, targets, 1e-4)
    wanted = torch.autograd.grad(total, weight)[0]
    found = head_loss(hidden.bfloat16(), weight, targets, 1e-4, 8)
    grad_hidden, grad_weight = torch.autograd.grad(found, (hidden, weight))
    assert (found.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32,) * 3
    assert abs((found - value).item()) < 0.05
    assert relative_error(grad_weight, wanted) < 0.05


@pytest.mark.parametrize("has_units", [True, False], ids=["pytorch", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_of_many_chunks_is_summed_in_fp32(monkeypatch, dtype, has_units):
    monkeypatch.setattr(layers, "_has_half_units", lambda: has_units)
    generator = torch.Generator().manual_seed(0)
    rows = 2048  # the same 16 rows again and again: summed in bf16 they would stop adding up after some 256 chunks
    hidden = torch.randn(16, 24, generator=generator).to(dtype).repeat(rows // 16, 1)
    weight = (torch.randn(V, 24, generator=generator) / 8).to(dtype).float().requires_grad_()
    targets = torch.randint(0, V, (16,), generator=generator).repeat(rows // 16)
    found = torch.autograd.grad(head_loss(hidden, weight, targets, 1e-4, 16), weight)[0]
    wanted = torch.autograd.grad(head_loss(hidden[:16], weight, targets[:16], 1e-4, 16), weight)[0]
    assert relative_error(found, wanted) < 1e-6
    exact = torch.autograd.grad(plain(hidden.double(), weight.double(), targets, 1e-4)[1], weight)[0]
    assert relative_error(found, exact) < {torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


def test_l2wrap_goes_to_the_first_of_equal_maxima():
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0])
    with_wrap = torch.autograd.grad(head_loss(hidden, weight, targets, 0.5), weight)[0]
    without = torch.autograd.grad(head_loss(hidden, weight, targets, 0.0), weight)[0]
    torch.testing.assert_close((with_wrap - without).flatten(), torch.tensor([0.0, 1.0, 0.0, 0.0]).double())


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[3e4], [-3e4], [0.0]])
    loss = head_loss(hidden, weight, torch.tensor([1, 0]), 0.0)
    assert loss.item() == pytest.approx(3e4)
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_uniform_logits_give_ln_v():
    loss = head_loss(torch.zeros(5, 3), torch.ones(V, 3), torch.arange(5), 1e-4)
    assert float(loss) == pytest.approx(math.log(V), rel=1e-6)


def test_no_gradient_work_without_gradients(monkeypatch):
    hidden, weight, targets = inputs(torch.float32)
    products = []

    def counting(x, w):
        products.append(x.shape)
        return x @ w.t()

    monkeypatch.setattr(loss_module, "linear", counting)
    with torch.no_grad():
        loss = head_loss(hidden, weight, targets, 1e-4, 10)
    assert products == [(10, C)] * 3 + [(7, C)]
    assert not loss.requires_grad


def test_a_large_vocabulary_is_cut_into_chunks(monkeypatch):
    rows = []
    original = loss_module._softmax_loss

    def recording(logits, *rest):
        rows.append(logits.shape[0])
        return original(logits, *rest)

    monkeypatch.setattr(loss_module, "_softmax_loss", recording)
    monkeypatch.setitem(loss_module.LOGITS_IN_FLIGHT, "cpu", V * 20)
    hidden, weight, targets = inputs(torch.float32)
    head_loss(hidden, weight, targets, 0.0)
    assert rows == [20, 17]


def test_on_a_gpu_the_weight_gradient_is_added_up_inside_the_product(monkeypatch):
    """A stand-in for CUDA's addmm, which takes bf16 factors, an fp32 sum and the sum as its output."""
    a, b = torch.randn(V, 8).bfloat16(), torch.randn(8, C).bfloat16()
    total = torch.randn(V, C)
    wanted = total.double() + a.double() @ b.double()
    rounded = total.clone()
    loss_module._add_product(rounded, a, b)
    assert 1e-5 < relative_error(rounded.double(), wanted) < 4e-3

    use_gpus_addmm(monkeypatch, mixed_addmm)
    loss_module._add_product(total, a.as_subclass(OnGpu), b)
    assert relative_error(total.double(), wanted) < 1e-6


class OnGpu(torch.Tensor):
    is_cuda = True


def mixed_addmm(summand, first, second, *, out_dtype, out):
    """CUDA's addmm of torch 2.10 and later."""
    dtypes = (summand.dtype, first.dtype, second.dtype, out_dtype)
    assert dtypes == (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    assert out is summand
    return out.copy_(summand + first.float() @ second.float())


def use_gpus_addmm(monkeypatch, addmm):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "addmm", addmm)
    loss_module._has_mixed_addmm.cache_clear()


@pytest.fixture(autouse=True)
def _forget_the_addmm():
    yield
    loss_module._has_mixed_addmm.cache_clear()


REFUSALS = {
    "torch 2.8 and 2.9": "self and mat2 must have the same dtype, but got Float and BFloat16",
    "before sm_80": "gemm input type at::BFloat16 and output type float is only supported for CUDA devices with "
    "compute capability 8.0 or higher",
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_gpu_without_that_product_rounds_it_first(monkeypatch, refusal):
    def refusing(summand, first, second, *, out_dtype, out):
        raise RuntimeError(refusal)

    use_gpus_addmm(monkeypatch, refusing)
    a, b, total = torch.randn(V, 8).bfloat16(), torch.randn(8, C).bfloat16(), torch.randn(V, C)
    wanted = total.double() + a.double() @ b.double()
    loss_module._add_product(total, a.as_subclass(OnGpu), b)
    assert relative_error(total.double(), wanted) < 4e-3


def test_this_torch_has_that_product_by_the_name_that_is_called():
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        pytest.skip("it came with torch 2.8")
    schema = torch.ops.aten.addmm.dtype_out._schema
    names = [argument.name for argument in schema.arguments]
    assert names == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]


def test_only_the_hidden_gradient_is_asked_for():
    hidden, weight, targets = inputs(torch.float32)
    loss = head_loss(hidden, weight.detach(), targets, 1e-4)
    loss.backward()
    assert hidden.grad is not None
