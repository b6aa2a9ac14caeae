"""Table of the formats that `export` writes. Torch-free, so that `--help` can list them.

A further format is one row and, where it has a configuration of its own, one file.
"""

from __future__ import annotations

from rwkv_cluster.interchange.export.fla import FLA
from rwkv_cluster.interchange.export.format import Format
from rwkv_cluster.interchange.export.gguf_folder import GGUF_FOLDER
from rwkv_cluster.interchange.export.transformers import TRANSFORMERS
from rwkv_cluster.interchange.export.web_rwkv import ST
from rwkv_cluster.interchange.layouts import Reshape
from rwkv_cluster.model.versions.table import VERSIONS


def _native(name: str) -> tuple[str, Reshape]:
    return name, Reshape.NONE


PTH = Format(
    name="pth",
    reader="the rwkv package, RWKV-LM, RWKV-PEFT, RWKV-Runner",
    versions=tuple(VERSIONS),
    container="pth",
    suffix=".pth",
    rename=_native,
)
SAFETENSORS = Format(
    name="safetensors",
    reader="whatever reads RWKV-LM's names",
    versions=tuple(VERSIONS),
    container="safetensors",
    suffix=".safetensors",
    rename=_native,
)
FORMATS: dict[str, Format] = {each.name: each for each in (PTH, SAFETENSORS, FLA, TRANSFORMERS, ST, GGUF_FOLDER)}
"""The rows by name."""
