"""Initial weights: published vectors, ranges, orthogonality, and what a fresh model predicts."""

import math

import pytest
import torch
from tiny_models import VERSIONS, some_tokens, tiny_model_config

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV

# C 128, N 64, L 2; entries 0, 1, 63, 64, 127 of tensors that RWKV-LM's constructors compute
VECTORS = [
    ("x052", "blocks.1.att.time_mix_v", [0.300000, 0.388388, 1.001561, 1.007107, 1.296086]),
    ("x052", "blocks.1.att.time_mix_r", [0.000000, 0.297302, 0.837592, 0.840896, 0.998041]),
    ("x052", "blocks.0.att.time_decay", [-6.000000, -5.831614, -2.939124, -2.905194, -1.000000]),
    ("x060", "blocks.0.att.time_decay", [-6.000000, -5.831614, -2.939124, -2.905194, -1.000000]),
    ("x052", "blocks.1.att.time_decay", [-6.000000, -5.999690, -4.769608, -4.730237, -1.000000]),
    ("x060", "blocks.1.att.time_decay", [-6.000000, -5.999690, -4.769608, -4.730237, -1.000000]),
    ("x052", "blocks.1.att.time_faaaa", [1.000000, 1.092126, 0.503937, 0.596063, 0.100000]),
    ("x060", "blocks.1.att.time_faaaa", [1.000000, 1.092126, 0.503937, 0.596063, 0.100000]),
    ("x060", "blocks.1.att.time_maa_v", [0.700000, 0.611612, -0.001561, -0.007107, -0.296086]),
    ("x060", "blocks.1.ffn.time_maa_k", [1.000000, 0.454746, 0.084799, 0.082996, 0.000980]),
    ("x070", "blocks.1.att.x_r", [1.000000, 0.384428, 0.068435, 0.066967, 0.000784]),
    ("x070", "blocks.1.att.x_k", [1.000000, 0.816989, 0.219729, 0.215416, 0.002741]),
    ("x070", "blocks.0.att.w0", [-8.000000, -7.796545, -0.023622, -4.976378, 3.000000]),
    ("x070", "blocks.1.att.w0", [-8.000000, -7.843417, -1.523529, -6.476285, 3.000000]),
    ("x070", "blocks.1.att.a0", [-0.690000, -0.668105, 0.108425, -0.488425, 0.310000]),
    ("x070", "blocks.1.att.v0", [0.930000, 0.926850, 0.731575, 0.728425, 0.530000]),
    ("x070", "blocks.1.att.k_k", [0.760000, 0.759213, 0.710394, 0.709606, 0.660000]),
    ("x070", "blocks.1.ffn.x_k", [1.000000, 0.261587, 0.043339, 0.042397, 0.000490]),
]


ZERO = (
    *("att.output.weight", "ffn.value.weight", "ffn.receptance.weight"),
    *("att.w1", "att.a1", "att.v1", "att.g1", "att.time_maa_w1", "att.time_decay_w1"),
)


def initialised(config, seed=0):
    model = RWKV(config)
    initialize(model, seed)
    return model


@pytest.fixture(scope="module")
def weights():
    return {
        version: initialised(ModelConfig(model_type=version, n_layer=2, n_embd=128, vocab_size=300)).state_dict()
        for version in VERSIONS
    }


@pytest.mark.parametrize(("version", "name", "wanted"), VECTORS)
def test_published_vectors(weights, version, name, wanted):
    found = weights[version][name].flatten()[[0, 1, 63, 64, 127]]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=6e-7, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_has_its_rule(weights, version):
    """Each tensor is one of: vector above, zero, orthogonal with its gain, uniform in its range, one."""
    rows = {"att.receptance": 1, "att.value": 1, "ffn.key": 1, "att.key": 0.1, "att.gate": 0.1}
    for name, tensor in weights[version].items():
        suffix = name.split(".", 2)[2] if name.startswith("blocks.") else name
        if (
            suffix in ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")
            or name.endswith("bias")
            or suffix in ("att.w1", "att.a1", "att.v1", "att.g1", "att.time_maa_w1", "att.time_decay_w1")
        ):
            assert not tensor.any(), name
        elif suffix == "emb.weight":
            assert 0.9e-4 < tensor.abs().max() <= 1e-4
        elif suffix in ("att.time_maa_w2", "att.time_decay_w2"):
            assert 0.009 < tensor.abs().max() <= 0.01
        elif suffix == "head.weight":
            assert_orthogonal(tensor, 0.5 * math.sqrt(300 / 128))
        elif suffix in ("att.w2", "att.a2", "att.v2", "att.g2"):
            assert_orthogonal(tensor, 0.1)
        elif suffix.removesuffix(".weight") in rows:
            assert_orthogonal(tensor, rows[suffix.removesuffix(".weight")])
        elif suffix == "att.ln_x.weight":
            layer = int(name.split(".")[1])
            torch.testing.assert_close(tensor, torch.full((128,), ((1 + layer) / 2) ** 0.7))
        elif name.endswith(".weight"):
            assert (tensor == 1).all(), name
        else:
            assert tensor.isfinite().all()
            assert suffix.startswith(("att.time_", "ffn.time_", "att.x_", "ffn.x_", "att.")), name


def assert_orthogonal(matrix, gain):
    rows, cols = matrix.shape
    gram = matrix @ matrix.t() if rows <= cols else matrix.t() @ matrix
    torch.testing.assert_close(gram, gain**2 * torch.eye(min(rows, cols)), atol=2e-6, rtol=0)


def test_x070_constants(weights):
    assert (weights["x070"]["blocks.0.att.k_a"] == torch.tensor(1.02)).all()
    assert (weights["x070"]["blocks.1.att.r_k"] == torch.tensor(-0.04)).all()


def test_small_vocabulary_has_the_plain_head_gain():
    config = ModelConfig(model_type="x070", n_layer=1, n_embd=64, vocab_size=20)
    assert_orthogonal(initialised(config).head.weight.detach(), 0.5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fresh_model_predicts_uniformly_and_is_the_identity(version):
    model = initialised(tiny_model_config(version, n_embd=128, head_size_a=64))
    tokens = some_tokens(2, 30)
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), some_tokens(2, 30, seed=9).flatten())
    assert abs(loss.item() - math.log(50)) < 0.3
    embedded = model.blocks[0].ln0(model.emb(tokens))
    assert torch.equal(model.hidden(tokens), model.ln_out(embedded))


def test_the_seed_decides_and_nothing_else():
    def weights_of(seed, **changes):
        return initialised(tiny_model_config("x070", **changes), seed).state_dict()

    first, again, other = weights_of(5), weights_of(5), weights_of(6)
    torch.manual_seed(77)
    without = weights_of(5, block0_value_residual=False)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["emb.weight"], other["emb.weight"])
    assert not torch.equal(first["blocks.0.att.key.weight"], first["blocks.1.att.key.weight"])
    assert first.keys() - without.keys() == {f"blocks.0.att.v{i}" for i in range(3)}
    assert all(torch.equal(first[name], without[name]) for name in without)


def test_initialising_in_bf16_rounds_the_fp32_weights():
    model = RWKV(tiny_model_config("x060")).bfloat16()
    initialize(model, 0)
    wanted = initialised(tiny_model_config("x060")).state_dict()
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("version", VERSIONS)
def test_one_layer_is_allowed(version):
    model = initialised(tiny_model_config(version, n_layer=1))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
