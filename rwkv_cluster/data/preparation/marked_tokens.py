"""Tokens that carry whether they are trained on, between tokenizing and writing.

Where a preparation has tokens that are not trained on, its store holds int32 in place of the token file's dtype: id t,
or ~t for a token that is not trained on. Shuffle and split move such values as they move ids, and the last writer
separates them.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from rwkv_cluster.data.binidx import TokenFileWriter
from rwkv_cluster.data.hashed_file import FileDigest
from rwkv_cluster.data.loss_mask import LossMaskWriter, mask_path

DTYPE = np.dtype(np.int32)


def marked(ids: np.ndarray, trained: np.ndarray | bool) -> np.ndarray:
    """Ids [n] of any integer type below 2^31 with their marks [n] bool, or one for all."""
    wide = ids.astype(DTYPE)
    return np.where(trained, wide, ~wide)


def untrained(ids: np.ndarray) -> np.ndarray:
    """Ids [n] marked as not trained on."""
    return np.invert(ids, dtype=DTYPE)


def is_trained(values: np.ndarray) -> np.ndarray:
    """The marks of marked tokens."""
    return values >= 0


def count_untrained(values: np.ndarray) -> int:
    """Number of marked tokens that are not trained on; 0 of tokens that have no marks."""
    return int(np.count_nonzero(values < 0)) if values.dtype == DTYPE else 0


def plain_ids(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The ids of marked tokens, or of tokens that have no marks."""
    return (values ^ (values >> 31)).astype(dtype) if values.dtype == DTYPE else values.astype(dtype, copy=False)


class MarkedTokensWriter:
    """Writes marked tokens as a token file of `dtype` and, with_mask, its mask; used as `TokenFileWriter`."""

    def __init__(self, prefix: Path, dtype: np.dtype, *, with_mask: bool) -> None:
        self._tokens = TokenFileWriter(prefix, dtype)
        self._mask_path = mask_path(prefix)
        self._with_mask = with_mask
        self._mask: LossMaskWriter | None = None

    def __enter__(self) -> MarkedTokensWriter:
        with ExitStack() as files:
            files.enter_context(self._tokens)
            if self._with_mask:
                self._mask = files.enter_context(LossMaskWriter(self._mask_path))
            self._open_files = files.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open_files.__exit__(kind, error, traceback)

    def write(self, tokens: bytes | memoryview | np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their marked tokens back to back and each one's length."""
        self.write_tokens(tokens)
        self.end_documents(lengths)

    def write_tokens(self, tokens: bytes | memoryview | np.ndarray) -> None:
        """Append marked tokens of a document whose end is told later."""
        values = tokens.reshape(-1) if isinstance(tokens, np.ndarray) else np.frombuffer(tokens, DTYPE)
        self._tokens.write_tokens(plain_ids(values, self._tokens.dtype))
        if self._mask is not None:
            self._mask.write(is_trained(values))

    def end_documents(self, lengths: np.ndarray) -> None:
        """Say how the tokens written since the last call divide into documents."""
        self._tokens.end_documents(lengths)

    @property
    def n_tokens(self) -> int:
        return self._tokens.n_tokens

    @property
    def n_documents(self) -> int:
        return self._tokens.n_documents

    @property
    def n_trained(self) -> int | None:
        """Number of tokens that the mask marks; None without one."""
        return None if self._mask is None else self._mask.n_trained

    @property
    def files(self) -> dict[str, FileDigest]:
        """Digest of each finished file by its name."""
        mask = {} if self._mask is None else {self._mask_path.name: self._mask.digest}
        return self._tokens.files | mask
