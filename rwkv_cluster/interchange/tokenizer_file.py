"""The tokenizer that lies beside weights in a folder of the Hub. Torch-free."""

from __future__ import annotations

from pathlib import Path

from rwkv_cluster.tokenizer.world import FILE_NAME
from rwkv_cluster.workdir import HUB_TOKENIZER

_NAMES = (FILE_NAME, HUB_TOKENIZER, "vocab.txt", "vocab.json")


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that says its tokenizer, the World vocabulary first; None where there is none."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)
