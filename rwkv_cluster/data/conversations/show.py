"""The first document of prepared data for a person, with what is trained on marked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.data.loss_mask import LossMask, mask_path
from rwkv_cluster.runtime.terminal.text_safety import visible
from rwkv_cluster.tokenizer import decode_for_display

MOST_TOKENS = 1000
_END = "<end>"  # of the document, id 0


class Marks(NamedTuple):
    """What encloses a text that is trained on."""

    before: str
    after: str


BRACKETS = Marks("[[", "]]")
GREEN = Marks("\x1b[32m", "\x1b[0m")


def first_document(prefix: Path, tokenizer: Any, marks: Marks) -> str:
    """Text of the first document of a token file with a mask, without what would command a terminal.

    At most MOST_TOKENS of it.
    """
    with open_tokens(prefix) as tokens:
        ids = tokens[0]
        trained = LossMask(mask_path(prefix), tokens.n_tokens).read(0, len(ids))
    more = f" ... and {len(ids) - MOST_TOKENS:,} tokens more" if len(ids) > MOST_TOKENS else ""
    return marked_text(ids[:MOST_TOKENS], trained[:MOST_TOKENS], tokenizer, marks) + more


def marked_text(ids: np.ndarray, trained: np.ndarray, tokenizer: Any, marks: Marks) -> str:
    """Text of ids [n], with marks around what is trained on, [n] bool."""
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    parts = []
    for start, stop in pairwise(edges):
        part = ids[start:stop]
        text = visible(decode_for_display(tokenizer, part[part != 0].tolist())) + _END * int((part == 0).sum())
        parts.append(f"{marks.before}{text}{marks.after}" if trained[start] else text)
    return "".join(parts)
