"""Whole models with an adapter: names, what is trained, where they begin, and the merged weights that are the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import VERSIONS, adapter_parts, add_trained_adapter, relative_error, some_tokens, tiny_model

from rwkv_cluster.adapters.base import MergedTensors, fingerprint, require_base
from rwkv_cluster.adapters.layers import attach, initialize_adapter, load_adapter, saved_names
from rwkv_cluster.adapters.table import KINDS, adapter_shapes
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train.optimizers.param_groups import freeze

EVERY = list(itertools.product(VERSIONS, KINDS))


def _adapted(model_type: str, adapter: AdapterConfig, *, moved: bool = True) -> RWKV:
    """A small frozen model with an adapter; moved: away from its initial values, as training does."""
    model = tiny_model(model_type)
    freeze(model, (), torch.float32)
    if moved:
        add_trained_adapter(model, adapter)
    else:
        attach(model, adapter)
        initialize_adapter(model, seed=0)
    return model


@pytest.mark.parametrize(("model_type", "kind"), EVERY)
def test_names_and_shapes_are_those_that_the_table_says(model_type: str, kind: str) -> None:
    adapter = AdapterConfig(kind=kind, rank=3)
    base = {name: tuple(tensor.shape) for name, tensor in tiny_model(model_type).state_dict().items()}
    trained, kept = adapter_shapes(adapter, base)
    model = _adapted(model_type, adapter)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {**base, **trained, **kept}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trained)
    assert saved_names(model) == {*trained, *kept}
    assert len({name.rpartition(".")[0] for name in trained}) == 6 * model.config.n_layer


@pytest.mark.parametrize(("model_type", "kind"), EVERY)
def test_logits_begin_as_those_of_the_base_and_merged_ones_stay_equal(model_type: str, kind: str) -> None:
    tokens, adapter = some_tokens(2, 9), AdapterConfig(kind=kind, rank=5)
    base = tiny_model(model_type)
    with torch.no_grad():
        wanted = base(tokens)
        assert relative_error(_adapted(model_type, adapter, moved=False)(tokens), wanted) < 1e-5
        model = _adapted(model_type, adapter)
        logits = model(tokens)
        assert relative_error(logits, wanted) > 1e-3
        merged = MergedTensors(base.state_dict(), adapter_parts(model), adapter)
        assert list(merged.keys()) == list(base.state_dict())
        whole = tiny_model(model_type)
        whole.load_state_dict(dict(merged))
        assert relative_error(whole(tokens), logits) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_reaches_the_adapter_alone(kind: str) -> None:
    model = _adapted("x070", AdapterConfig(kind=kind, rank=3))
    next_token_loss(model, some_tokens(2, 9)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_recomputed_blocks_draw_the_same_masks() -> None:
    gradients = []
    for grad_cp in (False, True):
        model = _adapted("x070", AdapterConfig(kind="lora", rank=3, dropout=0.3))
        model.grad_cp = grad_cp
        torch.manual_seed(5)
        next_token_loss(model, some_tokens(2, 9)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_without_a_gradient_nothing_is_dropped() -> None:
    plain, dropping = (_adapted("x070", AdapterConfig(kind="lora", rank=3, dropout=p)) for p in (0.0, 0.9))
    with torch.no_grad():
        assert torch.equal(plain(some_tokens(1, 5)), dropping(some_tokens(1, 5)))


def test_initial_values_are_those_of_their_seed_and_name() -> None:
    adapter = AdapterConfig(kind="lora", rank=3)
    one, two = (adapter_parts(_adapted("x070", adapter, moved=False)) for _ in range(2))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    fewer = adapter_parts(_adapted("x070", AdapterConfig(kind="lora", rank=3, targets=["*.ffn.value"]), moved=False))
    assert set(fewer) < set(one)
    assert all(torch.equal(one[name], tensor) for name, tensor in fewer.items())


def test_an_adapter_of_another_shape_is_refused() -> None:
    parts = adapter_parts(_adapted("x070", AdapterConfig(kind="lora", rank=3)))
    model = _adapted("x070", AdapterConfig(kind="lora", rank=4))
    with pytest.raises(CheckpointError, match=r"blocks.0.att.key.lora_A is \(3, 32\), this run has \(4, 32\)"):
        load_adapter(model, parts)
    load_adapter(_adapted("x070", AdapterConfig(kind="lora", rank=3)), parts)


def test_a_target_that_fits_no_matrix_is_refused() -> None:
    for target in ("*.att.kex", "head", "*.att.w1", "emb"):
        with pytest.raises(ConfigError, match="fits none of 12 names"):
            attach(tiny_model("x070"), AdapterConfig(kind="lora", targets=[target]))


def test_a_fingerprint_is_of_names_dtypes_shapes_and_bytes() -> None:
    weights = tiny_model("x070").state_dict()
    known = fingerprint(weights)
    assert fingerprint(dict(reversed(weights.items()))) == known
    without_unused = {name: tensor for name, tensor in weights.items() if name != "blocks.0.att.v1"}
    assert fingerprint(without_unused) == known
    changed = {**weights, "ln_out.bias": weights["ln_out.bias"].clone()}
    changed["ln_out.bias"][0] = torch.nextafter(changed["ln_out.bias"][0], torch.tensor(9.0))
    others = [
        fingerprint(changed),
        fingerprint({**weights, "ln_out.bias": weights["ln_out.bias"].bfloat16()}),
        fingerprint({**weights, "blocks.0.att.x_r": weights["blocks.0.att.x_r"].flatten()}),
    ]
    assert len({known, *others}) == 4
    with pytest.raises(CheckpointError, match=f"fingerprint {others[0]}, expected {known}"):
        require_base(changed, known, "there")
