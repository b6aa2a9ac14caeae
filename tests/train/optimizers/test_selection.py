"""Which parameters a run trains, keeps and saves, by the patterns of its configuration."""

from __future__ import annotations

import pytest
import torch
from tiny_models import some_tokens, tiny_model

from rwkv_cluster.config import AdapterConfig, TrainingConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.parameter_shapes import parameter_shapes
from rwkv_cluster.model.parameter_shapes import trained as used_parameters
from rwkv_cluster.train.optimizers.param_groups import build_optimizer, freeze, set_learning_rate
from rwkv_cluster.train.optimizers.selection import RunParameters, run_parameters


def _of(adapter: AdapterConfig | None = None, **training: object) -> RunParameters:
    return run_parameters(tiny_model("x070").config, 50, TrainingConfig(**training), adapter or AdapterConfig())


def test_all_is_what_is_used() -> None:
    shapes, found = parameter_shapes(tiny_model("x070").config, 50), _of()
    assert (found.trained, found.saved, found.in_memory) == (used_parameters(shapes), shapes, shapes)
    assert set(found.frozen) == {f"blocks.0.att.v{number}" for number in "012"}
    assert not found.is_partial


def test_patterns_choose_by_whole_names() -> None:
    found = _of(train=["blocks.*.ffn.*", "head.weight", "att.key"][:2])
    assert set(found.trained) == {
        "head.weight",
        *(f"blocks.{layer}.ffn.{name}" for layer in (0, 1) for name in ("x_k", "key.weight", "value.weight")),
    }
    assert found.is_partial
    assert found.saved == found.model
    assert set(found.in_memory) == set(found.model)


def test_an_adapter_is_trained_and_saved_alone() -> None:
    found = _of(AdapterConfig(kind="pissa", rank=4, targets=["blocks.1.att.key"]))
    assert found.trained == {"blocks.1.att.key.lora_A": (4, 32), "blocks.1.att.key.lora_B": (32, 4)}
    assert found.saved == {
        **found.trained,
        "blocks.1.att.key.first_A": (4, 32),
        "blocks.1.att.key.first_B": (32, 4),
    }
    assert set(found.in_memory) == {*found.model, *found.saved}
    assert found.adapter_hidden == 32 + 8, "the input, and what both low-rank pairs make of it"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"train": ["heat.weight"]},
            r"training.train has 'heat.weight', which fits none .* One of them is head.weight",
        ),
        ({"train": ["blocks.0.att.v0"]}, "training.train has 'blocks.0.att.v0', which fits none"),
        ({"lr_multipliers": {"*.lora_B": 2.0}}, r"training.lr_multipliers has '\*.lora_B', which fits none"),
        ({"train": ["head.weight"], "lr_multipliers": {"emb.*": 2.0}}, r"training.lr_multipliers has 'emb.\*'"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _of(**fields)


def test_multipliers_follow_the_first_pattern_that_fits_on_top_of_the_groups() -> None:
    training = TrainingConfig(lr_multipliers={"head.weight": 0.25, "*.weight": 0.5, "*.att.w0": 3.0})
    optimizer = build_optimizer(tiny_model("x070"), "x070", training)
    set_learning_rate(optimizer, 1e-2)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["head.weight"] == 1e-2 * 0.25
    assert rates["emb.weight"] == 1e-2 * 0.5
    assert rates["blocks.0.att.w0"] == 1e-2 * 6.0  # twice as RWKV-LM has it
    assert rates["blocks.0.att.a0"] == 1e-2


def test_an_adapters_matrices_decay_as_matrices_do() -> None:
    from rwkv_cluster.train.optimizers.adamw import group_of

    assert group_of("blocks.0.att.key.lora_B", torch.zeros(4, 2), "x070") == (1.0, True)
    assert group_of("blocks.0.att.key.lora_magnitude_vector", torch.zeros(4), "x070") == (1.0, False)


@pytest.mark.parametrize("model_type", ["x052", "x060", "x070"])
def test_what_is_frozen_has_the_training_precision_and_no_gradient(model_type: str) -> None:
    """The trained gradients are those of a model in which all are trained, from the same rounded values.

    Values are trained too: RWKV-7's trained value matrix adds its input's gradient to its LoRA's before it is rounded.
    """
    whole = tiny_model(model_type)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.bfloat16())
    whole.compute_dtype = torch.bfloat16
    partial = tiny_model(model_type)
    partial.load_state_dict(whole.state_dict())
    partial.compute_dtype = torch.bfloat16
    parts = (".ffn.", "att.value.", "head.")
    chosen = [name for name, _ in partial.named_parameters() if any(part in name for part in parts)]
    freeze(partial, chosen, torch.bfloat16)
    for model in (whole, partial):
        next_token_loss(model, some_tokens(2, 9)).backward()
    of_whole = dict(whole.named_parameters())
    for name, parameter in partial.named_parameters():
        assert (parameter.dtype, parameter.grad is not None) == (
            (torch.float32, True) if name in chosen else (torch.bfloat16, False)
        )
        if name in chosen:
            assert torch.equal(parameter.grad, of_whole[name].grad), name
