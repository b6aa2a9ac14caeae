"""The tokenizer that lies beside weights, as in a folder of the Hub. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_cluster.tokenizer import GenericTokenizer
from rwkv_cluster.tokenizer.hub import HubTokenizer
from rwkv_cluster.tokenizer.world import FILE_NAME
from rwkv_cluster.workdir import HUB_TOKENIZER

_NAMES = (FILE_NAME, HUB_TOKENIZER, "vocab.txt", "vocab.json")


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that says its tokenizer, the World vocabulary first; None where there is none."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def tokenizer_beside(folder: Path) -> Any | None:
    """The tokenizer of the World vocabulary, or of the tokenizer.json, that lies in `folder`; None where neither does.

    Raises DataError for a file that is none, ConfigError without the package that reads a tokenizer.json.
    """
    if (folder / FILE_NAME).is_file():
        return GenericTokenizer(folder / FILE_NAME)
    return HubTokenizer(folder / HUB_TOKENIZER) if (folder / HUB_TOKENIZER).is_file() else None
