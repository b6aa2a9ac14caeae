"""Greedy longest match: in C when `trie_matcher.c` was compiled at installation, otherwise in Python, same ids.

Both forms take bytes and return token ids, or the position of the first byte that no token fits; wording the
error is the caller's part. The library also parses integers, for `rwkv_cluster.tokenizer.integer`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 2  # of the C interface; equals rwkv_text_version() of a library that fits
LIBRARY = "_trie_matcher.so"  # of any Python: see BuildWithKernels
CELLS_TOO_FEW = -2
MOST_CELLS = 2**31 - 512

IdType = type[np.uint16] | type[np.int32]
Encoded = tuple[np.ndarray, int]  # ids [n_tokens], and -1 or the position of the first byte that has none


def load_library(path: Path) -> ctypes.CDLL | None:
    """The compiled `trie_matcher.c` at `path` with its signatures; None when it is of another version."""
    library = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "rwkv_trie_build": [pointer, pointer, pointer, size, pointer, size],
        "rwkv_encode_uint16": [pointer, ctypes.c_char_p, size, pointer],
        "rwkv_encode_int32": [pointer, ctypes.c_char_p, size, pointer],
        "rwkv_decode": [pointer, pointer, size, pointer, size, pointer],
        "rwkv_integers_uint16": [ctypes.c_char_p, size, ctypes.c_uint64, pointer],
        "rwkv_integers_int32": [ctypes.c_char_p, size, ctypes.c_uint64, pointer],
    }
    if library.rwkv_text_version() != VERSION:
        return None
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, size
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library that was installed with the package, or None (the reason is logged once)."""
    reason = "it was not built, which takes a C compiler when the package is installed"
    path = Path(__file__).with_name(LIBRARY)
    if path.exists():
        try:
            if (loaded := load_library(path)) is not None:
                return loaded
            reason = f"{path} belongs to another version"
        except (OSError, AttributeError) as error:
            reason = str(error)
    logging.getLogger("rwkv_cluster").warning(
        "no native tokenizer: %s. Text is tokenized in Python, about 60 times slower; install the package "
        "again with gcc present to change that",
        reason,
    )
    return None


def id_dtype(vocab_size: int) -> IdType:
    """Type of token ids in arrays and files: uint16 up to a vocabulary of 65,536, int32 above."""
    return np.uint16 if vocab_size <= 65_536 else np.int32


def address_of(target: np.ndarray) -> Any:
    """Argument for a C function that fills `target` (not empty), at a quarter of target.ctypes' cost."""
    return ctypes.byref(ctypes.c_char.from_buffer(target.data))


class NativeMatcher:
    """Greedy longest match in C over a trie of 8-byte cells: 1 MB for RWKV's 65,529 tokens."""

    def __init__(self, tokens: Mapping[int, bytes], native: ctypes.CDLL) -> None:
        ordered = sorted((token, token_id) for token_id, token in tokens.items() if token_id != 0)
        ordered.append((tokens.get(0, b""), 0))  # behind those that are matched: id 0 is only ever decoded
        lengths = np.array([len(token) for token, _ in ordered], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.array([token_id for _, token_id in ordered], np.int32)
        self._bytes = b"".join(token for token, _ in ordered)
        self._spans = np.zeros((max(tokens) + 1, 2), np.int64)  # by id: start of its bytes, their number
        self._spans[ids] = np.stack([starts[:-1], lengths], axis=1)
        self.cells = _build_trie(native, self._bytes, starts, ids[:-1])
        self._cells_at, self._spans_at = self.cells.ctypes.data, self._spans.ctypes.data
        self._encode = {np.uint16: native.rwkv_encode_uint16, np.int32: native.rwkv_encode_int32}
        self._decode = native.rwkv_decode

    def encode(self, data: bytes, dtype: IdType) -> Encoded:
        """Ids [n_tokens] of `data` as `dtype`, and -1 or the first position where no token fits."""
        ids = np.empty(len(data) or 1, dtype)
        count = self._encode[dtype](self._cells_at, data, len(data), address_of(ids))
        return (ids[:count].copy(), -1) if count >= 0 else (ids[:0], -1 - count)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of ids, without those of ids that the vocabulary lacks."""
        ids = np.ascontiguousarray(tokens if _is_integer_array(tokens) else array("q", tokens), np.int64)
        arguments = self._bytes, self._spans_at, len(self._spans), ids.ctypes.data, len(ids)
        out = np.empty(self._decode(*arguments, None) or 1, np.uint8)
        return out[: self._decode(*arguments, address_of(out))].tobytes()


def _build_trie(native: ctypes.CDLL, joined: bytes, starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Cells [n] uint64 of sorted tokens: t is joined[starts[t] : starts[t + 1]]. starts int64, ids int32."""
    room = 1024 + 2 * len(joined)
    while True:
        cells = np.empty(min(room, MOST_CELLS), np.uint64)
        used = native.rwkv_trie_build(
            joined, starts.ctypes.data, ids.ctypes.data, len(ids), cells.ctypes.data, len(cells)
        )
        if used != CELLS_TOO_FEW or room >= MOST_CELLS:
            break
        room *= 4
    if used < 0:
        raise MemoryError(f"no memory for the trie of {len(ids):,} tokens")
    return cells[:used].copy()


def _is_integer_array(tokens: Sequence[int] | np.ndarray) -> bool:
    return isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu"


class PythonMatcher:
    """The same in Python: the tokens that share the next two bytes are tried by falling length."""

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self._tokens = tokens
        self._ids = {token: token_id for token_id, token in tokens.items() if token_id != 0}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) > 1:
                lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {pair: sorted(found, reverse=True) for pair, found in lengths.items()}

    def encode(self, data: bytes, dtype: IdType) -> Encoded:
        """Ids [n_tokens] of `data` as `dtype`, and -1 or the first position where no token fits."""
        ids, lengths = self._ids, self._lengths
        token_ids: list[int] = []
        position = 0
        while position < len(data):
            for length in (*lengths.get(data[position : position + 2], ()), 1):
                token_id = ids.get(data[position : position + length])
                if token_id is not None:
                    break
            else:
                return np.empty(0, dtype), position
            token_ids.append(token_id)
            position = min(position + length, len(data))
        return np.array(token_ids, dtype), -1

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of ids, without those of ids that the vocabulary lacks."""
        ids = tokens.tolist() if isinstance(tokens, np.ndarray) else array("q", tokens)
        return b"".join([self._tokens.get(token_id, b"") for token_id in ids])


def build_matcher(tokens: Mapping[int, bytes]) -> NativeMatcher | PythonMatcher:
    """The fastest matcher that this installation has for {id: token}. Id 0 is never matched."""
    native = library()
    return PythonMatcher(tokens) if native is None else NativeMatcher(tokens, native)
