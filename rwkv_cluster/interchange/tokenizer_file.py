"""The tokenizer that lies beside weights in a folder of the Hub. Torch-free."""

from __future__ import annotations

from pathlib import Path

WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"
_NAMES = (WORLD_VOCABULARY, "tokenizer.json", "vocab.txt", "vocab.json")


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that says its tokenizer, the World vocabulary first; None where there is none."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)
