"""The three architectures: against the NumPy oracle, in segments, under checkpointing, in bf16."""

import pytest
import torch
from naive_wkv import relative_errors
from numpy_rwkv import NumpyRWKV
from tiny_models import VERSIONS, relative_error, some_tokens, tiny_model, tiny_model_config

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.kernels.fused import reference as plain
from rwkv_cluster.model import layers
from rwkv_cluster.model.layers import linear, linear_and_down, tanh_linear
from rwkv_cluster.model.loss import head_loss
from rwkv_cluster.model.rwkv import RWKV

SHAPES = [
    {},
    {"n_layer": 1},
    {"n_layer": 3, "n_embd": 48, "head_size_a": 8},
    {"n_embd": 64, "head_size_a": 64},
]


def oracle_logits(model, tokens):
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return torch.stack([torch.from_numpy(NumpyRWKV(weights).logits(row.tolist())) for row in tokens])


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_logits_equal_the_numpy_oracle(model_type, changes):
    model = tiny_model(model_type, **changes)
    tokens = some_tokens(2, 19)
    wanted = oracle_logits(model, tokens)
    assert relative_error(model(tokens).double(), wanted) < 1e-5
    assert relative_error(model.double()(tokens), wanted) < 1e-12


def test_attention_narrower_than_the_model():
    for model_type in ("x052", "x060"):
        model = tiny_model(model_type, dim_att=16, dim_ffn=40)
        assert model.blocks[0].att.key.weight.shape == (16, 32)
        assert model.blocks[0].ffn.key.weight.shape == (40, 32)
        tokens = some_tokens(1, 9)
        assert relative_error(model(tokens).double(), oracle_logits(model, tokens)) < 1e-5


@pytest.mark.parametrize("model_type", VERSIONS)
def test_segments_equal_the_whole(model_type):
    model = tiny_model(model_type)
    tokens = some_tokens(2, 33)
    whole = model(tokens)
    parts, state = [], None
    for begin, end in ((0, 17), (17, 18), (18, 19), (19, 33)):
        logits, state = model.forward_with_state(tokens[:, begin:end], state)
        parts.append(logits)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5
    assert relative_error(model(tokens[:, 17:], model.forward_with_state(tokens[:, :17])[1]), whole[:, 17:]) < 1e-5
    assert [part.dtype for part in state[0]] == [torch.float32] * 3
    assert state[0].wkv.shape == (2, 2, 16, 16)


@pytest.mark.parametrize("model_type", VERSIONS)
def test_gradients_match_float64(model_type):
    tokens = some_tokens(2, 21)
    grads = []
    for dtype in (torch.float32, torch.float64):
        model = tiny_model(model_type).to(dtype)
        loss = head_loss(model.hidden(tokens[:, :-1]).flatten(0, 1), model.head.weight, tokens[:, 1:].flatten(), 1e-4)
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    unused = {name for name, grad in grads[0].items() if grad is None}
    assert unused == ({f"blocks.0.att.v{i}" for i in range(3)} if model_type == "x070" else set())
    for name in grads[0].keys() - unused:
        assert relative_error(grads[0][name].double(), grads[1][name]) < 1e-3, name


@pytest.mark.parametrize("model_type", VERSIONS)
def test_checkpointing_changes_nothing(model_type):
    tokens = some_tokens(2, 20)
    results = []
    for grad_cp in (False, True):
        model = tiny_model(model_type, n_layer=3)
        model.grad_cp = grad_cp
        model(tokens).square().mean().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*results, strict=True))


@pytest.mark.parametrize("model_type", VERSIONS)
def test_bf16_activations_on_fp32_masters(model_type):
    model = tiny_model(model_type, noise=0.02)
    tokens = some_tokens(2, 40)
    wanted = model(tokens)
    model.compute_dtype = torch.bfloat16
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), wanted) < 0.05
    logits.float().logsumexp(-1).mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    state = model.forward_with_state(tokens)[1][0]
    assert (state.att_shift.dtype, state.wkv.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("model_type", VERSIONS)
def test_bf16_masters_equal_bf16_copies_of_fp32_masters(model_type):
    tokens = some_tokens(1, 12)
    rounded = tiny_model(model_type).bfloat16()
    masters = tiny_model(model_type)
    masters.compute_dtype = torch.bfloat16
    assert torch.equal(rounded(tokens), masters(tokens))


def test_backends_agree():
    tokens = some_tokens(2, 37)
    for model_type in VERSIONS:
        logits = []
        for backend in ("reference", "chunked"):
            model = RWKV(tiny_model_config(model_type), wkv_backend=backend)
            model.load_state_dict(tiny_model(model_type).state_dict())
            logits.append(model(tokens))
        assert relative_error(*logits) < 1e-5


def test_a_model_that_was_never_initialised_gives_nan():
    assert RWKV(tiny_model_config("x070"))(some_tokens(1, 3)).isnan().all()


def test_vocab_size_is_required():
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        RWKV(ModelConfig(model_type="x070"))


@pytest.fixture(params=["onednn", "mkl", "pytorch"])
def product(request, monkeypatch):
    """The ways of a product on a CPU, whatever units this one has: in fp32 by either library, or left to PyTorch."""
    monkeypatch.setattr(layers, "_has_fast_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(layers, "_has_half_units", lambda: request.param == "pytorch")
    return request.param


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3), (torch.float16, 4e-4)], ids=str
)
def test_linear_and_its_gradients(product, dtype, tolerance, strided):
    generator = torch.Generator().manual_seed(0)
    rounded = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 40, 24), (56, 24), (56,), (3, 40, 56))
    ]
    if strided:
        rounded = [z.transpose(0, -1).contiguous().transpose(0, -1) for z in rounded]
    results = []
    for precision in (dtype, torch.float64):
        *leaves, upstream = (z.to(precision) for z in rounded)
        leaves = [z.requires_grad_() for z in leaves]
        y = linear(*leaves) if precision == dtype else leaves[0] @ leaves[1].t() + leaves[2]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream)])
    assert [(z.shape, z.dtype) for z in results[0]] == [(z.shape, dtype) for z in results[1]]
    assert max(relative_errors(*results)) < tolerance


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (1,)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_two_products_of_one_input(product, dtype, tolerance, frozen):
    """A frozen input or matrix has no gradient and costs none."""
    generator = torch.Generator().manual_seed(0)
    rounded = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 40, 24), (56, 24), (24, 8), (3, 40, 56), (3, 40, 8))
    ]
    results = []
    for precision in (dtype, torch.float64):
        x, weight, down, *upstream = (z.to(precision) for z in rounded)
        leaves = [z.requires_grad_(i not in frozen) for i, z in enumerate((x, weight, down))]
        ys = linear_and_down(*leaves) if precision == dtype else (x @ weight.t(), x @ down)
        trained = [z for z in leaves if z.requires_grad]
        results.append([*(y.detach() for y in ys), *torch.autograd.grad(ys, trained, upstream)])
    assert [(z.shape, z.dtype) for z in results[0]] == [(z.shape, dtype) for z in results[1]]
    assert max(relative_errors(*results)) < tolerance


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (2,)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)], ids=str
)
def test_the_second_half_of_a_lora(product, dtype, tolerance, frozen):
    """What is trained gets its gradient in one product, beside which the bias is not summed again."""
    generator = torch.Generator().manual_seed(0)
    rounded = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 40, 8), (8, 24), (24,), (3, 40, 24))
    ]
    results = []
    for precision in (dtype, torch.float64):
        z, up, bias, upstream = (x.to(precision) for x in rounded)
        leaves = [x.requires_grad_(i not in frozen) for i, x in enumerate((z, up, bias))]
        y = tanh_linear(*leaves) if precision == dtype else torch.tanh(z) @ up + bias
        with torch.no_grad():
            assert precision != dtype or torch.equal(tanh_linear(*leaves), y)
        trained = [x for x in leaves if x.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y, trained, upstream)])
    assert [(x.shape, x.dtype) for x in results[0]] == [(x.shape, dtype) for x in results[1]]
    assert max(relative_errors(*results)) < tolerance


def test_products_in_fp32_keep_no_fp32_copies(monkeypatch):
    monkeypatch.setattr(layers, "_has_half_units", lambda: False)
    x, weight = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((40, 24), (56, 24)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        y = linear(x, weight)
    assert type(y.grad_fn).__name__ == "_Fp32LinearBackward"
    assert [(z.shape, z.dtype) for z in kept] == [(x.shape, torch.bfloat16), (weight.shape, torch.bfloat16)]


def test_squared_relu_gradient():
    x = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(plain.squared_relu, (x,))
