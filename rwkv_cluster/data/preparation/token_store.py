"""Encoded documents on disk in input order, between tokenizing and shuffling.

Three flat files in the temporary directory: tokens (of the token file's dtype, or marked, see `marked_tokens`), lengths
(int32 a document) and, for a validation split, digests (uint64 a document). Everything reads them in blocks, so that
memory stays the same for any number and any length of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_cluster.data.binidx import MAX_ITEM_TOKENS
from rwkv_cluster.errors import DataError

LARGE_DOCUMENT_BYTES = 8 << 20  # a larger document is copied from file to file and never held whole
_HELD_BYTES = 32 << 20  # as long as the tokens are fewer, they stay in memory
_BLOCK_BYTES = LARGE_DOCUMENT_BYTES
_BLOCK_DOCUMENTS = 1 << 17


@dataclass(frozen=True)
class Block:
    """Consecutive documents. first_token: where they begin in the token store. lengths: [n] int32, with the final 0.

    digests: [n] uint64 or None. large: it is one document of more than LARGE_DOCUMENT_BYTES.
    """

    first_token: int
    lengths: np.ndarray
    digests: np.ndarray | None
    large: bool


class EncodedDocuments:
    """Documents in input order under `directory`. Write with `add` and `add_pieces`, then `finish`, then read."""

    def __init__(self, directory: Path, dtype: np.dtype, *, with_digests: bool) -> None:
        self.dtype = dtype
        self.n_tokens = 0
        self.n_documents = 0
        self._token_path = directory / "tokens"
        self._length_path = directory / "lengths"
        self._digest_path = directory / "digests" if with_digests else None
        self._held: list[np.ndarray] | None = []
        self._memory: np.ndarray | None = None
        self._files = ExitStack()
        self._tokens = self._files.enter_context(open(self._token_path, "xb"))  # noqa: SIM115
        self._lengths = self._files.enter_context(open(self._length_path, "xb"))  # noqa: SIM115
        self._digests = None
        if self._digest_path:
            self._digests = self._files.enter_context(open(self._digest_path, "xb"))  # noqa: SIM115

    def add(self, tokens: np.ndarray, lengths: np.ndarray, digests: np.ndarray | None) -> None:
        """Append documents: tokens back to back, each with its final 0."""
        self._write_tokens(tokens)
        self._lengths.write(lengths.astype(np.int32).tobytes())
        if self._digests is not None:
            assert digests is not None
            self._digests.write(digests.tobytes())
        self.n_documents += len(lengths)

    def add_pieces(self, pieces: Iterable[np.ndarray], digest: Callable[[], int], place: str) -> None:
        """Append one document that comes in pieces, without its final 0, which is added here.

        digest: called after the last piece when there are digests. A document without tokens is left out.
        """
        length = 0
        for piece in pieces:
            length += len(piece)
            if length >= MAX_ITEM_TOKENS:
                raise DataError(
                    f"{place}: has more than {MAX_ITEM_TOKENS:,} tokens, the most that a document of an indexed token "
                    "file can hold",
                    remedy="Split it into several files",
                )
            self._write_tokens(piece)
        if length:
            digests = np.array([digest()], np.uint64) if self._digests is not None else None
            self.add(np.zeros(1, self.dtype), np.array([length + 1]), digests)

    def _write_tokens(self, tokens: np.ndarray) -> None:
        self.n_tokens += len(tokens)
        if self._held is not None:
            self._held.append(tokens)
            if self.n_tokens * self.dtype.itemsize <= _HELD_BYTES:
                return
            tokens, self._held = np.concatenate(self._held), None
        self._tokens.write(np.ascontiguousarray(tokens, self.dtype).data)

    def finish(self) -> None:
        """End of writing."""
        self._files.close()
        self._memory = None if self._held is None else np.concatenate([np.empty(0, self.dtype), *self._held])
        self._held = None

    def blocks(self) -> Iterator[Block]:
        """All documents, in blocks of at most _BLOCK_BYTES and _BLOCK_DOCUMENTS."""
        most = _BLOCK_BYTES // self.dtype.itemsize
        with ExitStack() as files:
            length_file = files.enter_context(open(self._length_path, "rb"))
            digest_file = files.enter_context(open(self._digest_path, "rb")) if self._digest_path else None
            position = 0
            while (lengths := np.fromfile(length_file, np.int32, _BLOCK_DOCUMENTS)).size:
                digests = np.fromfile(digest_file, np.uint64, len(lengths)) if digest_file else None
                ends = np.cumsum(lengths, dtype=np.int64)
                start = 0
                while start < len(lengths):
                    base = int(ends[start - 1]) if start else 0
                    stop = max(start + 1, int(np.searchsorted(ends, base + most, side="right")))
                    part = slice(start, stop)
                    yield Block(
                        position + base,
                        lengths[part],
                        None if digests is None else digests[part],
                        large=int(ends[stop - 1]) - base > most,
                    )
                    start = stop
                position += int(ends[-1])

    def token_blocks(self, first: int, count: int) -> Iterator[np.ndarray]:
        """Tokens [first, first + count) in blocks of at most _BLOCK_BYTES."""
        most = _BLOCK_BYTES // self.dtype.itemsize
        if self._memory is not None:
            for start in range(first, first + count, most):
                yield self._memory[start : min(start + most, first + count)]
            return
        with open(self._token_path, "rb", buffering=0) as handle:
            handle.seek(first * self.dtype.itemsize)
            for start in range(0, count, most):
                yield np.fromfile(handle, self.dtype, min(most, count - start))

    def read(self, block: Block) -> np.ndarray:
        """Tokens of a block that is not large."""
        (tokens,) = self.token_blocks(block.first_token, int(block.lengths.sum(dtype=np.int64)))
        return tokens
