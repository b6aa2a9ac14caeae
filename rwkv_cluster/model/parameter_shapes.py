"""Widths of a model, and name and shape of every parameter, without a tensor: what a plan of a run counts.

Torch-free. `weights_file.expected_shapes` says the same from the modules themselves, and a test holds the two together.

L layers, V vocabulary, C width, A attention width.
"""

from __future__ import annotations

import math
import re

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.versions.table import VERSIONS, version_of
from rwkv_cluster.model.versions.version import ModelDims, Shapes

PARTS = ("emb", "head", "time mix", "channel mix", "LoRAs", "norms")
"""Parts of a model that `by_part` counts."""

_NORM = re.compile(r"\bln")


def model_dims(config: ModelConfig) -> ModelDims:
    """Every derived width: what RWKV-LM computes from `n_embd` where the configuration leaves it open."""
    return version_of(config).dims(config)


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a model with `vocab_size` rows in emb and head, whatever config.vocab_size says."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (vocab_size, C)}
    first, other = _block(config, 0), _block(config, 1)
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in (other if layer else first).items()}
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (vocab_size, C)}


def block_parameters(config: ModelConfig) -> int:
    """Number of elements in all blocks, by formula: blocks differ only in whether they are the first."""
    return count(_block(config, 0)) + (config.n_layer - 1) * count(_block(config, 1))


def count(shapes: Shapes) -> int:
    """Number of elements."""
    return sum(math.prod(shape) for shape in shapes.values())


def by_part(shapes: Shapes) -> dict[str, int]:
    """Number of elements of each of PARTS. LoRAs are their two matrices; their bias belongs to the time mix."""
    counts = dict.fromkeys(PARTS, 0)
    loras = _lora_names()
    for name, shape in shapes.items():
        counts[_part(name, loras)] += math.prod(shape)
    return counts


def trained(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Parameters that get a gradient: all but those of block 0 that nothing uses."""
    unused = unused_names()
    return {name: shape for name, shape in shapes.items() if name not in unused}


def unused_names() -> tuple[str, ...]:
    """Names of the parameters that a weights file may have and no computation uses: v0, v1, v2 of RWKV-7's block 0.

    Of all versions: a name that has once been given to such a tensor is never given to another.
    """
    return tuple(f"blocks.0.att.{name}" for version in VERSIONS.values() for name in version.unused_in_block_0)


def own_state_shapes(shapes: Shapes, *, with_shifts: bool) -> Shapes:
    """Parameters of a state of its own, see `own_state`, of a model with parameters `shapes`."""
    per_head = tuple(f".att.{version.per_head}" for version in VERSIONS.values())
    own: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not name.endswith(per_head):
            continue
        block, (n_head, size) = name.partition(".att.")[0], shape
        own[f"{block}.own_state.wkv"] = (n_head, size, size)
        if with_shifts:
            width = shapes[f"{block}.ln1.weight"]
            own |= {f"{block}.own_state.att_shift": width, f"{block}.own_state.ffn_shift": width}
    return own


def multiplied(shapes: Shapes) -> int:
    """Elements of the matrices of blocks that a token is multiplied with: dense ones and LoRAs, where they are used."""
    loras = _lora_names()
    matrices = {
        name: shape
        for name, shape in trained(shapes).items()
        if name.startswith("blocks.") and ((name.endswith(".weight") and len(shape) > 1) or _in_block(name) in loras)
    }
    return count(matrices)


def lora_hidden(config: ModelConfig) -> int:
    """Elements that one token has between the two matrices of each LoRA, in all blocks, where they are used."""
    version = version_of(config)
    shapes = version.time_mix(version.dims(config))
    ranks = {into: shapes[into][1] for into, _ in version.loras}
    unused = sum(rank for into, rank in ranks.items() if into in version.unused_in_block_0)
    return config.n_layer * sum(ranks.values()) - unused


def _lora_names() -> set[str]:
    """Names of the matrices of LoRAs, of all versions, below `blocks.<layer>.`."""
    return {f"att.{name}" for version in VERSIONS.values() for pair in version.loras for name in pair}


def _in_block(name: str) -> str:
    """The part of a parameter's name below `blocks.<layer>.`."""
    return name.split(".", 2)[-1]


def _part(name: str, loras: set[str]) -> str:
    if name in ("emb.weight", "head.weight"):
        return name.partition(".")[0]
    if _NORM.search(name):
        return "norms"
    if _in_block(name) in loras:
        return "LoRAs"
    return "time mix" if ".att." in name else "channel mix"


def _block(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    version, widths = version_of(config), model_dims(config)
    time_mix = {**version.time_mix(widths), "ln_x.weight": (widths.att,), "ln_x.bias": (widths.att,)}
    if layer == 0 and not config.block0_value_residual:
        time_mix = {name: shape for name, shape in time_mix.items() if name not in version.unused_in_block_0}
    return {
        **_norms(layer, widths.embd),
        **{f"att.{name}": shape for name, shape in time_mix.items()},
        **{f"ffn.{name}": shape for name, shape in version.channel_mix(widths).items()},
    }


def _norms(layer: int, C: int) -> dict[str, tuple[int, ...]]:
    names = ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2")
    return {f"{name}.{part}": (C,) for name in names for part in ("weight", "bias")}
