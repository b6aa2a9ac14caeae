"""Each layout has a name for every tensor of a model of its versions, and the name leads back."""

import pytest

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.interchange.layouts import LAYOUTS, Layout, Reshape, layout_of
from rwkv_cluster.model.parameter_shapes import parameter_shapes


def shapes_of(model_type: str) -> dict[str, tuple[int, ...]]:
    config = ModelConfig.model_validate({"model_type": model_type, "n_layer": 12, "n_embd": 64, "head_size_a": 32})
    return parameter_shapes(config, 100)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_tensor_has_a_name_that_leads_back_to_it(layout: Layout) -> None:
    for model_type in layout.versions:
        shapes = shapes_of(model_type)
        renamed = {}
        for native, shape in shapes.items():
            entry = layout.to_other(native)
            if entry is None:
                assert native in layout.dropped
                continue
            other, reshape = entry
            renamed[other] = reshape.outward(shape)
            assert layout.to_native(other) == (native, reshape)
            assert reshape.inward(renamed[other]) == shape
        assert len(renamed) == len(shapes) - sum(name in shapes for name in layout.dropped)
        assert layout_of(renamed) is layout


def test_the_names_and_shapes_of_flash_linear_attention() -> None:
    layout = LAYOUTS["fla"]
    assert layout.to_other("blocks.11.att.w1") == ("model.layers.11.attn.w_lora.lora.0.weight", Reshape.TRANSPOSE)
    assert layout.to_other("blocks.3.att.a0") == ("model.layers.3.attn.a_lora.lora.2.bias", Reshape.FLATTEN)
    assert layout.to_other("blocks.0.ln0.bias") == ("model.layers.0.pre_norm.bias", Reshape.NONE)
    assert layout.to_other("blocks.0.att.v1") is None
    assert layout.to_other("blocks.1.att.v1") == ("model.layers.1.attn.v_lora.lora.0.weight", Reshape.TRANSPOSE)


@pytest.mark.parametrize(
    ("layout", "native", "other", "reshape"),
    [
        ("transformers", "blocks.1.att.w1", "rwkv7.blocks.1.att.w1", Reshape.NONE),
        ("transformers", "blocks.0.ln0.weight", "rwkv7.blocks.0.ln0.weight", Reshape.NONE),
        ("transformers-rwkv", "blocks.1.att.w1", "model.layers.1.linear_attn.w1", Reshape.NONE),
        ("transformers-rwkv", "blocks.1.att.x_g", "model.layers.1.linear_attn.x_g", Reshape.FLATTEN),
        ("transformers-rwkv", "blocks.0.ln0.weight", "model.embedding_norm.weight", Reshape.NONE),
        ("rwkv-rs", "blocks.1.att.w1", "model.blocks.1.att.w1.weight", Reshape.TRANSPOSE),
        ("rwkv-rs", "blocks.1.att.g2", "model.blocks.1.att.g2.weight", Reshape.TRANSPOSE),
        ("rwkv-rs", "blocks.1.att.w0", "model.blocks.1.att.w0", Reshape.NONE),
        ("rwkv-5-hf", "blocks.1.att.time_mix_g", "rwkv.blocks.1.attention.time_mix_gate", Reshape.NONE),
        ("rwkv-5-hf", "blocks.1.ffn.time_mix_r", "rwkv.blocks.1.feed_forward.time_mix_receptance", Reshape.NONE),
        ("rwkv-6-hf", "blocks.1.ffn.time_maa_r", "rwkv.blocks.1.feed_forward.time_maa_r", Reshape.NONE),
        ("rwkv-6-hf", "blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight", Reshape.NONE),
    ],
)
def test_names_and_shapes_of_the_others(layout: str, native: str, other: str, reshape: Reshape) -> None:
    """As their converters and models have them, not as the table does."""
    assert LAYOUTS[layout].to_other(native) == (other, reshape)


def test_native_names_are_in_no_other_layout() -> None:
    for model_type in ("x052", "x060", "x070"):
        assert layout_of(shapes_of(model_type)) is None


def test_a_name_that_a_layout_does_not_know() -> None:
    with pytest.raises(KeyError):
        LAYOUTS["fla"].to_native("model.layers.0.attn.x_x")
    with pytest.raises(KeyError):
        LAYOUTS["fla"].to_other("blocks.0.att.time_decay")
