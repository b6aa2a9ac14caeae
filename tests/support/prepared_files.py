"""Prepared data read back: documents with what is trained on, and every byte of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.data.loss_mask import LossMask, mask_path


def plain_config(*paths: Path, **options: Any) -> DataConfig:
    """Documents once and in the input's order."""
    defaults = {"n_epochs_duplication": 1, "shuffle": False, "write_jsonl": False}
    return DataConfig(inputs=[str(path) for path in paths], **(defaults | options))


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """A JSONL file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def marked_documents(folder: Path, name: str = "train") -> list[tuple[list[int], list[int]]]:
    """(ids, 1 or 0 for whether each is trained on) of each document."""
    tokens = open_tokens(folder / name)
    lengths = [len(tokens[item]) for item in range(len(tokens))]
    mask = np.ones(tokens.n_tokens, bool)
    if mask_path(folder / name).exists():
        mask = LossMask(mask_path(folder / name), tokens.n_tokens).read(0, tokens.n_tokens)
    parts = np.split(mask.astype(int), np.cumsum(lengths)[:-1])
    return [(tokens[item].tolist(), bits.tolist()) for item, bits in enumerate(parts)]


def content(folder: Path) -> dict[str, bytes]:
    """Files by name, but the caches of time stamps and the lock."""
    caches = ("inputs.json", "verified.json", ".prepare.lock")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in caches}
