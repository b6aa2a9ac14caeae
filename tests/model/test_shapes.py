"""Names, shapes, LoRA ranks and parameter counts against RWKV-LM's, without allocating a tensor."""

import math

import pytest

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.weights_file import expected_shapes

# C: ranks of w, a, v, g by the rule of RWKV-v7/train_temp
RANKS = {
    256: (32, 32, 32, 64),
    512: (64, 64, 32, 128),
    768: (64, 64, 32, 128),
    1024: (64, 64, 64, 160),
    2048: (128, 128, 64, 224),
    2560: (128, 128, 96, 256),
    4096: (160, 160, 96, 320),
}


def count(**fields):
    return sum(math.prod(shape) for shape in expected_shapes(ModelConfig(**fields)).values())


@pytest.mark.parametrize(("width", "ranks"), RANKS.items())
def test_x070_ranks(width, ranks):
    widths = model_dims(ModelConfig(model_type="x070", n_embd=width))
    assert (widths.decay_rank, widths.a_rank, widths.v_rank, widths.gate_rank) == ranks


@pytest.mark.parametrize(
    ("model_type", "block0", "wanted"),
    [
        ("x052", True, 192_807_936),
        ("x060", True, 196_955_136),
        ("x070", True, 191_084_544),
        ("x070", False, 191_034_624),
    ],
)
def test_parameters_of_l12_c768(model_type, block0, wanted):
    fields = {"n_layer": 12, "n_embd": 768, "vocab_size": 65536, "block0_value_residual": block0}
    assert count(model_type=model_type, **fields) == wanted


def test_parameters_of_the_published_04b():
    fields = {"model_type": "x070", "n_layer": 24, "n_embd": 1024, "vocab_size": 65536}
    ranks = {"decay_lora_rank": 64, "a_lora_rank": 64, "v_lora_rank": 32, "gate_lora_rank": 128}
    with_block0 = count(**fields, **ranks)
    without = count(**fields, **ranks, block0_value_residual=False)
    assert with_block0 - without == 1024 + 2 * 1024 * 32
    assert 450_834_432 in (with_block0, without)


@pytest.mark.parametrize("width", [64, 256, 320])
@pytest.mark.parametrize("layers", [1, 3])
def test_parameters_by_formula(width, layers):
    V, C, L = 500, width, layers
    F = int(3.5 * C) // 32 * 32
    ranks = model_dims(ModelConfig(model_type="x070", n_embd=C))
    loras = ranks.decay_rank + ranks.a_rank + ranks.v_rank + ranks.gate_rank
    size = {"n_layer": L, "n_embd": C, "vocab_size": V}
    assert count(model_type="x052", **size) == 2 * V * C + 4 * C + L * (6 * C * C + 2 * C * F + 14 * C)
    x060 = 2 * V * C + 4 * C + L * (6 * C * C + 2 * C * F + 10 * 32 * C + 2 * 64 * C + 16 * C)
    assert count(model_type="x060", **size) == x060
    assert count(model_type="x070", **size) == 2 * V * C + 4 * C + L * (12 * C * C + 2 * C * loras + 19 * C)


LN = ("weight", "bias")
C, A, F, H, N, V = 64, 64, 224, 4, 16, 100
OUTER = {
    "emb.weight": (V, C),
    "head.weight": (V, C),
    **{f"ln_out.{part}": (C,) for part in LN},
    **{f"blocks.0.ln0.{part}": (C,) for part in LN},
}
BLOCK = {f"{norm}.{part}": (C,) for norm in ("ln1", "ln2") for part in LN} | {f"att.ln_x.{part}": (A,) for part in LN}
FOUR = {f"att.{name}.weight": (A, C) for name in ("receptance", "key", "value", "gate")} | {
    "att.output.weight": (C, A),
    "att.time_faaaa": (H, N),
}
FFN = {"ffn.key.weight": (F, C), "ffn.receptance.weight": (C, C), "ffn.value.weight": (C, F)}
X052 = {
    **{f"att.time_mix_{name}": (1, 1, C) for name in "kvrg"},
    **{f"ffn.time_mix_{name}": (1, 1, C) for name in "kr"},
    "att.time_decay": (H, N),
}
X060 = {
    **{f"att.time_maa_{name}": (1, 1, C) for name in "xwkvrg"},
    **{f"ffn.time_maa_{name}": (1, 1, C) for name in "kr"},
    "att.time_maa_w1": (C, 5 * 32),
    "att.time_maa_w2": (5, 32, C),
    "att.time_decay": (1, 1, A),
    "att.time_decay_w1": (C, 64),
    "att.time_decay_w2": (64, A),
}
X070 = {
    **{f"att.{name}": (1, 1, C) for name in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"]},
    **{f"att.{name}1": (C, rank) for name, rank in {"w": 24, "a": 16, "v": 8, "g": 40}.items()},
    **{f"att.{name}2": (rank, C) for name, rank in {"w": 24, "a": 16, "v": 8, "g": 40}.items()},
    **{f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")},
    "att.r_k": (H, N),
    "ffn.x_k": (1, 1, C),
    "ffn.key.weight": (4 * C, C),
    "ffn.value.weight": (C, 4 * C),
}


@pytest.mark.parametrize(
    ("model_type", "block"), [("x052", FOUR | FFN | X052), ("x060", FOUR | FFN | X060), ("x070", X070)]
)
def test_names_and_shapes(model_type, block):
    ranks = {"decay_lora_rank": 24, "a_lora_rank": 16, "v_lora_rank": 8, "gate_lora_rank": 40}
    config = ModelConfig(
        model_type=model_type,
        n_layer=2,
        n_embd=C,
        vocab_size=V,
        head_size_a=N,
        **(ranks if model_type == "x070" else {}),
    )
    wanted = OUTER | {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in (BLOCK | block).items()}
    assert expected_shapes(config) == wanted
