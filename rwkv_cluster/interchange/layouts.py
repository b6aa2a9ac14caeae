"""Table of the layouts that weights come in: what each program calls a tensor and in which shape it keeps it.

A further layout is one row of `LAYOUTS`. Native names are RWKV-LM's; every row maps to them and from them. Torch-free.

C width, r LoRA rank, H heads, N head size, i layer.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property


class Reshape(enum.Enum):
    """How a tensor's shape differs between the native layout and another."""

    NONE = "none"
    TRANSPOSE = "transpose"
    """native [C,r], there [r,C], or the other way round; of more axes the last two are swapped"""
    FLATTEN = "flatten"
    """native [1,1,C], there [C]"""

    def outward(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the layout, from the native one."""
        if self is Reshape.TRANSPOSE:
            return (*shape[:-2], shape[-1], shape[-2])
        return shape[-1:] if self is Reshape.FLATTEN else shape

    def inward(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Native shape, from that in the layout. A vector that is flattened there may also be [1,1,C] already."""
        if self is Reshape.TRANSPOSE:
            return (*shape[:-2], shape[-1], shape[-2])
        return (1, 1, shape[-1]) if self is Reshape.FLATTEN and len(shape) == 1 else shape


@dataclass(frozen=True)
class Rename:
    """One tensor, or one of every block: `{i}` stands for the layer, and for nothing where there is none."""

    native: str
    other: str
    reshape: Reshape = Reshape.NONE


@dataclass(frozen=True)
class Layout:
    """One program's names.

    Attributes:
        name: as `export --format` and messages say it.
        title: for a reader, e.g. "flash-linear-attention's names".
        telling: patterns of names, for each of which weights in this layout have one, and those in no other.
        versions: `model.model_type` that it exists for.
        renames: every tensor that a model of those versions may have. A tensor with two rows has had two names there:
            both are read, and the last is the one to write.
        dropped: native names that the layout has no place for, because no computation uses them.
    """

    name: str
    title: str
    telling: tuple[str, ...]
    versions: tuple[str, ...]
    renames: tuple[Rename, ...]
    dropped: tuple[str, ...] = ()

    def to_other(self, native: str) -> tuple[str, Reshape] | None:
        """Name there of a tensor with a native name, and its reshape; None where it is dropped.

        Raises KeyError for a name that this layout does not know.
        """
        if native in self.dropped:
            return None
        rename, layer = _entry(self._by_native, native)
        return rename.other.replace("{i}", layer), rename.reshape

    def to_native(self, other: str) -> tuple[str, Reshape]:
        """Native name of a tensor of this layout, and its reshape.

        Raises KeyError for a name that this layout does not know.
        """
        rename, layer = _entry(self._by_other, other)
        return rename.native.replace("{i}", layer), rename.reshape

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether weights with tensors of these names are in this layout."""
        names = list(names)
        return all(any(re.match(pattern, name) for name in names) for pattern in self.telling)

    @cached_property
    def _by_native(self) -> dict[str, Rename]:
        return {rename.native: rename for rename in self.renames}

    @cached_property
    def _by_other(self) -> dict[str, Rename]:
        return {rename.other: rename for rename in self.renames}


def _entry(table: Mapping[str, Rename], name: str) -> tuple[Rename, str]:
    """(Row of `name`, its layer); the layer is the first number between two dots. Raises KeyError."""
    match = re.search(r"\.(\d+)\.", name)
    if name in table or match is None:
        return table[name], ""
    return table[f"{name[: match.start(1)]}{{i}}{name[match.end(1) :]}"], match[1]


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout that weights with tensors of these names are in; None for an unknown one."""
    names = list(names)
    return next((layout for layout in LAYOUTS.values() if layout.recognises(names)), None)


_NORMS = ("weight", "bias")
_MIXES = tuple(f"x_{name}" for name in "rwkvag")
_VECTORS = (*_MIXES, "w0", "a0", "v0", "k_k", "k_a")
_LORA_MATRICES = tuple(f"{name}{side}" for name in "wavg" for side in "12")
_UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


def _pairs(native: str, other: str, parts: Iterable[str] = ("",), reshape: Reshape = Reshape.NONE) -> Iterator[Rename]:
    """`native` and `other` with each of `parts` behind both."""
    return (Rename(native + part, other + part, reshape) for part in parts)


def _flash_linear_attention() -> tuple[Rename, ...]:
    """RWKV7ForCausalLM: fla/models/rwkv7/modeling_rwkv7.py and utils/convert_from_rwkv7.py."""
    att, attn = "blocks.{i}.att.", "model.layers.{i}.attn."
    loras = [
        rename
        for name in "wavg"
        for rename in (
            Rename(f"{att}{name}1", f"{attn}{name}_lora.lora.0.weight", Reshape.TRANSPOSE),
            Rename(f"{att}{name}2", f"{attn}{name}_lora.lora.2.weight", Reshape.TRANSPOSE),
            Rename(f"{att}{name}0", f"{attn}{name}_lora.lora.2.bias", Reshape.FLATTEN),
        )
        if rename.native != f"{att}g0"
    ]
    matrices = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return (
        Rename("emb.weight", "model.embeddings.weight"),
        Rename("head.weight", "lm_head.weight"),
        *_pairs("ln_out.", "model.norm.", _NORMS),
        *_pairs("blocks.{i}.ln0.", "model.layers.{i}.pre_norm.", _NORMS),
        *_pairs("blocks.{i}.ln1.", "model.layers.{i}.attn_norm.", _NORMS),
        *_pairs("blocks.{i}.ln2.", "model.layers.{i}.ffn_norm.", _NORMS),
        *_pairs(att, attn, _MIXES),
        *loras,
        *_pairs(att, attn, ("k_k", "k_a"), Reshape.FLATTEN),
        Rename(att + "r_k", attn + "r_k"),
        *(Rename(f"{att}{native}.weight", f"{attn}{other}.weight") for native, other in matrices.items()),
        *_pairs(att + "ln_x.", attn + "g_norm.", _NORMS),
        Rename("blocks.{i}.ffn.x_k", "model.layers.{i}.ffn.x_k", Reshape.FLATTEN),
        *_pairs("blocks.{i}.ffn.", "model.layers.{i}.ffn.", ("key.weight", "value.weight")),
    )


def _block_names(prefix: str, *, without_loras: bool = False) -> Iterator[Rename]:
    """Tensors of RWKV-7's blocks under their native names and shapes, behind `prefix`."""
    matrices = (f"{name}.weight" for name in ("receptance", "key", "value", "output"))
    att = (*_VECTORS, *(() if without_loras else _LORA_MATRICES), "r_k", *matrices)
    parts = [
        *(f"{norm}.{part}" for norm in ("ln0", "ln1", "ln2", "att.ln_x") for part in _NORMS),
        *(f"att.{name}" for name in att),
        *(f"ffn.{name}" for name in ("x_k", "key.weight", "value.weight")),
    ]
    return _pairs("blocks.{i}.", prefix, parts)


def _transformers() -> tuple[Rename, ...]:
    """Rwkv7ForCausalLM of transformers' pull request 47787: native names behind `rwkv7.`."""
    return (
        Rename("emb.weight", "rwkv7.embeddings.weight"),  # of the branch's first converter
        Rename("emb.weight", "rwkv7.emb.weight"),
        *_block_names("rwkv7.blocks.{i}."),
        *_pairs("ln_out.", "rwkv7.ln_out.", _NORMS),
        Rename("head.weight", "head.weight"),
    )


def _transformers_rwkv() -> tuple[Rename, ...]:
    """RwkvForCausalLM of the fork transformers-rwkv: names in the manner of Qwen, vectors flat, LoRAs native."""
    att, attn = "blocks.{i}.att.", "model.layers.{i}.linear_attn."
    matrices = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return (
        Rename("emb.weight", "model.embed_tokens.weight"),
        Rename("head.weight", "lm_head.weight"),
        *_pairs("ln_out.", "model.norm.", _NORMS),
        *(Rename(f"blocks.0.ln0.{part}", f"model.embedding_norm.{part}") for part in _NORMS),
        *_pairs("blocks.{i}.ln1.", "model.layers.{i}.input_layernorm.", _NORMS),
        *_pairs("blocks.{i}.ln2.", "model.layers.{i}.post_attention_layernorm.", _NORMS),
        *_pairs(att, attn, _VECTORS, Reshape.FLATTEN),
        *_pairs(att, attn, (*_LORA_MATRICES, "r_k")),
        *(Rename(f"{att}{native}.weight", f"{attn}{other}.weight") for native, other in matrices.items()),
        *_pairs(att + "ln_x.", attn + "g_norm.", _NORMS),
        Rename("blocks.{i}.ffn.x_k", "model.layers.{i}.mlp.x_k", Reshape.FLATTEN),
        *_pairs("blocks.{i}.ffn.", "model.layers.{i}.mlp.", ("key.weight", "value.weight")),
    )


def _rwkv_rs() -> tuple[Rename, ...]:
    """State-dict adapter of rwkv-rs/rwkv-lm, and the older transformers-rwkv: LoRAs are Linear, all else is native."""
    att = "model.blocks.{i}.att."
    loras = (Rename(f"blocks.{{i}}.att.{name}", f"{att}{name}.weight", Reshape.TRANSPOSE) for name in _LORA_MATRICES)
    return (
        Rename("emb.weight", "model.embeddings.weight"),
        *_block_names("model.blocks.{i}.", without_loras=True),
        *loras,
        *_pairs("ln_out.", "model.ln_out.", _NORMS),
        Rename("head.weight", "head.weight"),
    )


def _rwkv_5_and_6(att: Iterable[Rename], ffn: Iterable[Rename]) -> tuple[Rename, ...]:
    """Rwkv5ForCausalLM and Rwkv6ForCausalLM of the RWKV organisation. att, ffn: the vectors and LoRAs of a block."""
    block, there = "blocks.{i}.", "rwkv.blocks.{i}."
    matrices = [f"{name}.weight" for name in ("receptance", "key", "value", "gate", "output")]
    return (
        Rename("emb.weight", "rwkv.embeddings.weight"),
        Rename("head.weight", "head.weight"),
        *_pairs("ln_out.", "rwkv.ln_out.", _NORMS),
        *_pairs(block + "ln0.", there + "pre_ln.", _NORMS),
        *_pairs(block + "ln1.", there + "ln1.", _NORMS),
        *_pairs(block + "ln2.", there + "ln2.", _NORMS),
        *_pairs(block + "att.ln_x.", there + "attention.ln_x.", _NORMS),
        *_pairs(block + "att.", there + "attention.", (*matrices, "time_decay", "time_faaaa")),
        *_pairs(block + "ffn.", there + "feed_forward.", ("receptance.weight", "key.weight", "value.weight")),
        *att,
        *ffn,
    )


def _rwkv_5() -> tuple[Rename, ...]:
    """Names of convert_rwkv5_checkpoint_to_hf.py in BBuf/RWKV-World-HF-Tokenizer."""
    mixes = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}

    def renames(native: str, there: str, of: str) -> Iterator[Rename]:
        return (Rename(f"{native}time_mix_{name}", f"{there}time_mix_{mixes[name]}") for name in of)

    att = renames("blocks.{i}.att.", "rwkv.blocks.{i}.attention.", "kvrg")
    return _rwkv_5_and_6(att, renames("blocks.{i}.ffn.", "rwkv.blocks.{i}.feed_forward.", "kr"))


def _rwkv_6() -> tuple[Rename, ...]:
    """Names of convert_rwkv6_checkpoint_to_hf.py in BBuf/RWKV-World-HF-Tokenizer."""
    parts = [*(f"time_maa_{name}" for name in (*"xwkvrg", "w1", "w2")), "time_decay_w1", "time_decay_w2"]
    att = _pairs("blocks.{i}.att.", "rwkv.blocks.{i}.attention.", parts)
    return _rwkv_5_and_6(att, _pairs("blocks.{i}.ffn.", "rwkv.blocks.{i}.feed_forward.", ("time_maa_k", "time_maa_r")))


_ROWS = (
    Layout(
        name="fla",
        title="flash-linear-attention's names",
        telling=(r"model\.layers\.\d+\.attn\.w_lora\.",),
        versions=("x070",),
        renames=_flash_linear_attention(),
        dropped=_UNUSED,
    ),
    Layout(
        name="transformers",
        title="the names of transformers' Rwkv7ForCausalLM",
        telling=(r"rwkv7\.blocks\.\d+\.att\.w1$",),
        versions=("x070",),
        renames=_transformers(),
        dropped=_UNUSED,
    ),
    Layout(
        name="transformers-rwkv",
        title="the names of transformers-rwkv",
        telling=(r"model\.layers\.\d+\.linear_attn\.r_proj\.",),
        versions=("x070",),
        renames=_transformers_rwkv(),
        dropped=_UNUSED,
    ),
    Layout(
        name="rwkv-rs",
        title="the names of rwkv-rs/rwkv-lm",
        telling=(r"model\.embeddings\.", r"model\.blocks\.\d+\.att\."),
        versions=("x070",),
        renames=_rwkv_rs(),
        dropped=_UNUSED,
    ),
    Layout(
        name="rwkv-5-hf",
        title="the names of the RWKV organisation's Rwkv5ForCausalLM",
        telling=(r"rwkv\.blocks\.\d+\.attention\.time_mix_gate$", r"rwkv\.blocks\.\d+\.attention\.time_faaaa$"),
        versions=("x052",),
        renames=_rwkv_5(),
    ),
    Layout(
        name="rwkv-6-hf",
        title="the names of the RWKV organisation's Rwkv6ForCausalLM",
        telling=(r"rwkv\.blocks\.\d+\.attention\.time_maa_x$",),
        versions=("x060",),
        renames=_rwkv_6(),
    ),
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ROWS}
"""The rows by name. The native layout, which all others are said in, is none of them."""
