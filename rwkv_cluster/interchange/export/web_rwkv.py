"""The .st of Ai00 and web-rwkv, as RWKV-Runner's backend-python/convert_safetensors.py makes it. Torch-free."""

from __future__ import annotations

from rwkv_cluster.interchange.export.format import Format
from rwkv_cluster.interchange.layouts import Reshape

_RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}
_SWAPPED = (
    *("time_mix_w1", "time_mix_w2", "time_decay_w1", "time_decay_w2"),
    *("w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2"),
)
"""Matrices of LoRAs: x @ w1 in RWKV-LM, w1 @ x there."""


def _rename(native: str) -> tuple[str, Reshape]:
    name = native.lower()
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    is_swapped = name.rpartition(".")[2] in _SWAPPED
    return name, Reshape.TRANSPOSE if is_swapped else Reshape.NONE


ST = Format(
    name="st",
    reader="Ai00, web-rwkv",
    versions=("x052", "x060", "x070"),
    container="safetensors",
    suffix=".st",
    rename=_rename,
    dtype="fp16",
)
