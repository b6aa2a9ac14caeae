"""How many bytes of text a token stands for: what makes losses of different tokenizers comparable, as bits per byte."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

END_OF_DOCUMENT_BYTES = 1  # as the line feed between the lines of a file


def token_bytes(tokenizer: Any) -> np.ndarray | None:
    """Bytes [vocab_size] by token id, int64. None for ids of no text, and for a tokenizer without `decodeBytes`."""
    if not hasattr(tokenizer, "decodeBytes"):
        return None
    sizes = np.zeros(int(tokenizer.vocab_size), np.int64)
    sizes[0] = END_OF_DOCUMENT_BYTES
    for token in range(1, len(sizes)):
        with suppress(LookupError):  # a number that the vocabulary leaves out
            sizes[token] = len(tokenizer.decodeBytes([token]))
    return sizes
