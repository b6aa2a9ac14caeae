"""Name and shape of every parameter, by version, without a tensor: what a plan of a run counts.

Torch-free. `state_dict.expected_shapes` says the same from the modules themselves, and a test holds the two together.

L layers, V vocabulary, C width, A attention width, F channel-mix width, H heads, N head size; ranks M, Dw, Da, Dv, Dg.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.shapes import ModelDims

Shapes = Mapping[str, tuple[int, ...]]
"""Of parameters, by name."""

PARTS = ("emb", "head", "time mix", "channel mix", "LoRAs", "norms")
"""In which `by_part` counts."""

_NORM = re.compile(r"\bln")
_LORA = re.compile(r"att\.(time_(maa|decay)_)?[wavg][12]$")
_FROZEN = re.compile(r"blocks\.0\.att\.v[012]")


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Of a model of `config` with `vocab_size` rows in emb and head, whatever config.vocab_size says."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (vocab_size, C)}
    first, other = _block(config, 0), _block(config, 1)
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in (other if layer else first).items()}
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (vocab_size, C)}


def block_parameters(config: ModelConfig) -> int:
    """Number of elements in all blocks, by formula: blocks differ only in whether they are the first."""
    return count(_block(config, 0)) + (config.n_layer - 1) * count(_block(config, 1))


def _block(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    return {**_norms(layer, config.n_embd), **_time_mix(config, layer), **_channel_mix(config)}


def count(shapes: Shapes) -> int:
    """Number of elements."""
    return sum(math.prod(shape) for shape in shapes.values())


def by_part(shapes: Shapes) -> dict[str, int]:
    """Number of elements of each of PARTS. LoRAs are their two matrices; their bias belongs to the time mix."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        counts[_part(name)] += math.prod(shape)
    return counts


def trained(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Those that get a gradient: all but v0, v1 and v2 of x070's block 0, which nothing uses."""
    return {name: shape for name, shape in shapes.items() if not _FROZEN.match(name)}


def _part(name: str) -> str:
    if name in ("emb.weight", "head.weight"):
        return name.partition(".")[0]
    if _NORM.search(name):
        return "norms"
    if _LORA.search(name):
        return "LoRAs"
    return "time mix" if ".att." in name else "channel mix"


def _norms(layer: int, C: int) -> dict[str, tuple[int, ...]]:
    names = ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2")
    return {f"{name}.{part}": (C,) for name in names for part in ("weight", "bias")}


def _time_mix(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    version = {"x052": _time_mix_x052, "x060": _time_mix_x060, "x070": _time_mix_x070}[config.model_type]
    widths = ModelDims.of(config)
    has_value_residual = layer > 0 or config.block0_value_residual
    shapes = version(widths, has_value_residual) | {"ln_x.weight": (widths.att,), "ln_x.bias": (widths.att,)}
    return {f"att.{name}": shape for name, shape in shapes.items()}


def _time_mix_x052(widths: ModelDims, _: bool) -> dict[str, tuple[int, ...]]:
    vectors = {f"time_mix_{name}": (1, 1, widths.embd) for name in "kvrg"}
    per_head = dict.fromkeys(("time_decay", "time_faaaa"), (widths.n_head, widths.head_size))
    return {**vectors, **per_head, **_matrices(widths, ("receptance", "key", "value", "gate"))}


def _time_mix_x060(widths: ModelDims, _: bool) -> dict[str, tuple[int, ...]]:
    C, A, M, Dw = widths.embd, widths.att, widths.mix_rank, widths.decay_rank
    return {
        **{f"time_maa_{name}": (1, 1, C) for name in "xwkvrg"},
        "time_maa_w1": (C, 5 * M),
        "time_maa_w2": (5, M, C),
        "time_decay": (1, 1, A),
        "time_decay_w1": (C, Dw),
        "time_decay_w2": (Dw, A),
        "time_faaaa": (widths.n_head, widths.head_size),
        **_matrices(widths, ("receptance", "key", "value", "gate")),
    }


def _time_mix_x070(widths: ModelDims, has_value_residual: bool) -> dict[str, tuple[int, ...]]:
    C = widths.embd
    ranks = {"w": widths.decay_rank, "a": widths.a_rank, "g": widths.gate_rank}
    ranks |= {"v": widths.v_rank} if has_value_residual else {}
    vectors = [f"x_{name}" for name in "rwkvag"] + ["k_k", "k_a", *(f"{name}0" for name in ranks if name != "g")]
    return {
        **{name: (1, 1, C) for name in vectors},
        **{f"{name}1": (C, rank) for name, rank in ranks.items()},
        **{f"{name}2": (rank, C) for name, rank in ranks.items()},
        "r_k": (widths.n_head, widths.head_size),
        **_matrices(widths, ("receptance", "key", "value")),
    }


def _matrices(widths: ModelDims, inputs: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    into = {f"{name}.weight": (widths.att, widths.embd) for name in inputs}
    return {**into, "output.weight": (widths.embd, widths.att)}


def _channel_mix(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    widths = ModelDims.of(config)
    C, F = widths.embd, widths.ffn
    mixes = {"x052": ("time_mix_k", "time_mix_r"), "x060": ("time_maa_k", "time_maa_r"), "x070": ("x_k",)}
    shapes: dict[str, tuple[int, ...]] = {name: (1, 1, C) for name in mixes[config.model_type]}
    shapes |= {"key.weight": (F, C), "value.weight": (C, F)}
    shapes |= {} if config.model_type == "x070" else {"receptance.weight": (C, C)}
    return {f"ffn.{name}": shape for name, shape in shapes.items()}
