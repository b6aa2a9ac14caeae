"""Token files that others made: checked once, then used where they are, or read as documents beside other inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_cluster.data.binidx import IndexedTokens, bin_path, idx_path, open_tokens
from rwkv_cluster.data.inputs.sources import Source
from rwkv_cluster.data.loss_mask import mask_path
from rwkv_cluster.data.manifest import FileRecord
from rwkv_cluster.errors import DataError
from rwkv_cluster.runtime.terminal.time_left import bytes_left

_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class CheckedPair:
    """A token file whose every token is in the vocabulary. content: sha256 of both files, back to back."""

    tokens: IndexedTokens
    bin: FileRecord
    idx: FileRecord
    content: str

    @property
    def n_documents(self) -> int:
        return len(self.tokens.doc_idx) - 1


def check_pair(prefix: Path, vocab_size: int) -> CheckedPair:
    """Read a token file once. Raises DataError naming document and position of a token outside the vocabulary."""
    tokens = open_tokens(prefix, vocab_size)
    if tokens.n_tokens == 0:
        raise DataError(f"{bin_path(prefix)} has no tokens")
    digest = hashlib.sha256()
    with bytes_left(f"checking {bin_path(prefix).name}", tokens.n_tokens * tokens.dtype.itemsize) as left:
        for start in range(0, tokens.n_tokens, _BLOCK_TOKENS):
            block = tokens.read(start, min(start + _BLOCK_TOKENS, tokens.n_tokens))
            digest.update(block.data)
            left.advance(block.nbytes)
    bin_record = FileRecord(bytes=tokens.n_tokens * tokens.dtype.itemsize, sha256=digest.hexdigest())
    idx_digest = hashlib.sha256()
    with open(idx_path(prefix), "rb", buffering=0) as handle:
        while content := handle.read(1 << 20):
            digest.update(content)
            idx_digest.update(content)
    idx_record = FileRecord(bytes=idx_path(prefix).stat().st_size, sha256=idx_digest.hexdigest())
    return CheckedPair(tokens, bin_record, idx_record, digest.hexdigest())


def refuse_masks(sources: Iterable[Source]) -> None:
    """Raises DataError for a token file with a loss mask beside it, which would be lost, and all be trained on."""
    for source in sources:
        mask = mask_path(source.path)
        if source.kind == "tokens" and mask.exists():
            raise DataError(
                f"{mask} says what is trained on in {bin_path(source.path).name}, and would be lost here",
                remedy="Name the rows that it was prepared from, or move the mask away to train on every token",
            )


def token_documents(prefix: Path, vocab_size: int) -> Iterator[Iterator[np.ndarray]]:
    """The documents of a token file, each as pieces of ids without a final 0. Raises DataError as `check_pair` does."""
    tokens = open_tokens(prefix, vocab_size)
    itemsize = tokens.dtype.itemsize
    for document in range(len(tokens.doc_idx) - 1):
        first, last = int(tokens.doc_idx[document]), int(tokens.doc_idx[document + 1])
        if first == last:
            continue
        start = int(tokens.pointers[first]) // itemsize
        stop = int(tokens.pointers[last - 1]) // itemsize + int(tokens.sizes[last - 1])
        if stop > start and tokens.read(stop - 1, stop)[0] == 0:
            stop -= 1
        yield _pieces(tokens, start, stop)


def _pieces(tokens: IndexedTokens, start: int, stop: int) -> Iterator[np.ndarray]:
    for first in range(start, stop, _BLOCK_TOKENS):
        yield tokens.read(first, min(first + _BLOCK_TOKENS, stop))
