"""Parameters counted without torch are the model's own, tensor for tensor."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import VERSIONS

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.parameter_shapes import PARTS, block_parameters, by_part, count, parameter_shapes, trained
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import expected_shapes

SHAPES: list[dict[str, Any]] = [
    {"n_layer": 1, "n_embd": 64, "vocab_size": 50},
    {"n_layer": 12, "n_embd": 768, "vocab_size": 65536},
    {"n_layer": 3, "n_embd": 96, "head_size_a": 32, "vocab_size": 77, "block0_value_residual": False},
    {"n_layer": 2, "n_embd": 128, "head_size_a": 64, "vocab_size": 300, "decay_lora_rank": 24, "mix_lora_rank": 20,
     "a_lora_rank": 17, "v_lora_rank": 9, "gate_lora_rank": 40},
]  # fmt: skip


def _of_x060_or_x052() -> dict[str, Any]:
    return {"n_layer": 2, "n_embd": 64, "dim_att": 128, "dim_ffn": 100, "vocab_size": 40}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_shapes_are_the_models(model_type: str, shape: dict[str, Any]) -> None:
    config = ModelConfig(model_type=model_type, **shape)
    assert parameter_shapes(config, shape["vocab_size"]) == expected_shapes(config)


@pytest.mark.parametrize("model_type", VERSIONS)
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_blocks_are_counted_by_formula(model_type: str, n_layer: int) -> None:
    config = ModelConfig(model_type=model_type, n_layer=n_layer, n_embd=64, block0_value_residual=False)
    shapes = parameter_shapes(config, 50)
    of_blocks = {name: shape for name, shape in shapes.items() if name.startswith("blocks.")}
    assert block_parameters(config) == count(of_blocks)


@pytest.mark.parametrize("model_type", ["x052", "x060"])
def test_widths_of_their_own(model_type: str) -> None:
    config = ModelConfig(model_type=model_type, **_of_x060_or_x052())
    assert parameter_shapes(config, 40) == expected_shapes(config)


@pytest.mark.parametrize("model_type", VERSIONS)
def test_every_parameter_is_of_one_part(model_type: str) -> None:
    config = ModelConfig(model_type=model_type, n_layer=2, n_embd=64, vocab_size=50)
    shapes = parameter_shapes(config, 50)
    parts = by_part(shapes)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == count(shapes)
    assert parts["emb"] == parts["head"] == 50 * 64
    assert parts["norms"] == (1 + 2 * 2 + 2 + 1) * 2 * 64
    loras = {"x052": 0, "x060": 2 * (10 * 32 + 2 * 64) * 64, "x070": 2 * 2 * 64 * 4 * 32}
    if model_type != "x070":
        assert parts["LoRAs"] == loras[model_type]
    assert parts["channel mix"] == sum(
        p.numel() for name, p in RWKV(config).named_parameters() if name.split(".")[2:3] == ["ffn"]
    )


@pytest.mark.parametrize("model_type", VERSIONS)
@pytest.mark.parametrize("block0", [True, False])
def test_trained_are_those_that_want_a_gradient(model_type: str, block0: bool) -> None:
    config = ModelConfig(model_type=model_type, n_layer=2, n_embd=64, vocab_size=50, block0_value_residual=block0)
    wanted = {name for name, parameter in RWKV(config).named_parameters() if parameter.requires_grad}
    assert set(trained(parameter_shapes(config, 50))) == wanted
