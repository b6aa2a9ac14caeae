"""Whole numbers as token ids: value v has id v + 1, and id 0 is end of document.

Text holds ASCII decimals between ASCII white space. Anything else (a sign, a point, a word, a value out of
range) is an error with its place; nothing is rounded, cut or wrapped around.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer.base import BaseTokenizer, identity_of, utf8, write_tokens
from rwkv_cluster.tokenizer.trie_matcher import Encoded, IdType, address_of, id_dtype, library
from rwkv_cluster.tokenizer.vocabulary import (
    MAX_TOKEN_ID,
    TokenizationError,
    VocabularyError,
    parse_vocabulary,
    shortened,
    write_vocabulary,
)

_DIGITS_AND_SPACE = b"0123456789 \t\n\v\f\r"
_WORD = re.compile(rb"[^ \t\n\v\f\r]+")


def parse_native(data: bytes, max_value: int, dtype: IdType, native: ctypes.CDLL) -> Encoded:
    """`parse_integers` in C."""
    ids = np.empty(len(data) // 2 + 1, dtype)
    parse = native.rwkv_integers_uint16 if dtype is np.uint16 else native.rwkv_integers_int32
    count = parse(data, len(data), max_value, address_of(ids))
    return (ids[:count].copy(), -1) if count >= 0 else (ids[:0], -1 - count)


def parse_numpy(data: bytes, max_value: int, dtype: IdType) -> Encoded:
    """`parse_integers` in NumPy, whose parser saturates on overflow and so cannot hide too large a value."""
    if not data.translate(None, _DIGITS_AND_SPACE):
        values = np.fromstring(data, np.int64, sep=" ") if data.strip() else np.empty(0, np.int64)
        if not values.size or values.max() <= max_value:
            return (values + 1).astype(dtype), -1
    for word in _WORD.finditer(data):
        digits = word.group().lstrip(b"0") or b"0"
        if not word.group().isdigit() or len(digits) > 10 or int(digits) > max_value:
            return np.empty(0, dtype), word.start()
    raise AssertionError("the text as a whole is faulty, but none of its words is")


def parse_integers(data: bytes, max_value: int, dtype: IdType) -> Encoded:
    """Value + 1 for each whole number 0..max_value in `data`, and -1 or where the first other word begins."""
    native = library()
    return parse_numpy(data, max_value, dtype) if native is None else parse_native(data, max_value, dtype, native)


@dataclass(frozen=True)
class IntegerCodec:
    """Both directions for values 0..max_value. `noun` is what messages call a value."""

    max_value: int
    noun: str

    @property
    def vocab_size(self) -> int:
        """Ids in use: one for each value, and 0."""
        return self.max_value + 2

    def ids_of_text(self, data: bytes) -> np.ndarray:
        """Ids [n] of decimals between white space. Raises TokenizationError with the word's byte position."""
        ids, position = parse_integers(data, self.max_value, id_dtype(self.vocab_size))
        if position >= 0:
            word = _WORD.match(data, position)
            assert word is not None
            text = word.group().decode("utf-8", "replace")
            raise TokenizationError(f"byte {position}: {self._fault(text)}", position)
        return ids

    def ids_of_values(self, values: Sequence[int] | np.ndarray) -> np.ndarray:
        """Ids [n] of integers of any type. Raises TokenizationError, naming the index, for another value."""
        array = self._integers(values, self.noun)
        if array.size and (array.min() < 0 or array.max() > self.max_value):
            index = int(np.argmax((array < 0) | (array > self.max_value)))
            raise TokenizationError(f"index {index}: {self._fault(str(array[index]))}")
        dtype = id_dtype(self.vocab_size)
        return np.add(array, 1, dtype=dtype, casting="unsafe") if array.size else np.empty(0, dtype)

    def values_of_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Values [n] of ids, without those of 0. Raises TokenizationError with the index of an unknown id."""
        array = self._integers(ids, "id")
        if array.size and (array.min() < 0 or array.max() > self.max_value + 1):
            index = int(np.argmax((array < 0) | (array > self.max_value + 1)))
            raise TokenizationError(
                f"index {index}: Invalid token ID {array[index]}, expected 0 to {self.max_value + 1}"
            )
        return array[array != 0].astype(np.int64) - 1

    def _integers(self, values: Sequence[int] | np.ndarray, noun: str) -> np.ndarray:
        if isinstance(values, np.ndarray):
            if values.ndim == 1 and (values.dtype.kind in "iu" or not values.size):
                return values if values.size else np.empty(0, np.int64)
            shape = f"an array of type {values.dtype} and shape {values.shape}"
            raise TokenizationError(
                f"{shape} is not a 1-D array of integers", remedy="Convert it first, e.g. with astype"
            )
        values = list(values)
        for index, value in enumerate(values):
            if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
                raise TokenizationError(
                    f"index {index}: {shortened(repr(value))} is not a whole number, as a {noun} must be"
                )
            if not -(2**63) <= value < 2**63:
                raise TokenizationError(
                    f"index {index}: {self._fault(str(value)) if noun == self.noun else 'id too large'}"
                )
        return np.array(values, np.int64)

    def _fault(self, text: str) -> str:
        if re.fullmatch(r"-[0-9]+", text):
            what = "is below 0"
        elif re.fullmatch(r"[0-9]+", text):
            what = f"is above {self.max_value}"
        elif re.fullmatch(r"[-+]?[0-9]*\.[0-9]*([eE][-+]?[0-9]+)?", text):
            what = "is not a whole number"
        else:
            what = "is not a number"
        advice = "Text needs the byte or generic tokenizer" if what == "is not a number" else "Correct the data"
        if what.startswith("is above") and self.noun == "value":
            advice += ", or raise max_value"
        return f"{shortened(repr(text))} {what}; {self.noun}s must be 0 to {self.max_value}. {advice}"


class _ValueTokenizer(BaseTokenizer):
    """Whole numbers 0..max_value between white space: id = value + 1. Subclasses give the codec and the tokens."""

    END_OF_DOC_TOKEN = 0

    def __init__(self, codec: IntegerCodec, end_of_document: bytes) -> None:
        self._codec = codec
        self._end_of_document = end_of_document

    @property
    def vocab_size(self) -> int:
        """max_value + 2: every value, and 0 for end of document."""
        return self._codec.vocab_size

    @cached_property
    def idx2token(self) -> dict[int, bytes]:
        """{id: decimal digits}; id 0 is empty or a zero byte."""
        return dict(self._tokens())

    @cached_property
    def token2idx(self) -> dict[bytes, int]:
        """The inverse of idx2token."""
        return {token: token_id for token_id, token in self.idx2token.items()}

    def _tokens(self) -> Iterator[tuple[int, bytes]]:
        yield 0, self._end_of_document
        for value in range(self._codec.max_value + 1):
            yield value + 1, b"%d" % value

    def encode(self, src: str) -> list[int]:
        """Token ids of decimals between white space. Raises TokenizationError."""
        return self.encode_to_array(src).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """Ids [n] of a text, uint16 or int32 by vocab_size. Raises TokenizationError with a position."""
        return self._codec.ids_of_text(utf8(text))

    def encode_values(self, values: Sequence[int] | np.ndarray) -> np.ndarray:
        """Ids [n] of integers, uint16 or int32 by vocab_size. Raises TokenizationError."""
        return self._codec.ids_of_values(values)

    def decode(self, tokens: Sequence[int]) -> str:
        """Values joined by spaces. Raises TokenizationError for an unknown id."""
        return " ".join(map(str, self._codec.values_of_ids(tokens).tolist()))

    def save_vocab(self, filepath: str | Path) -> None:
        """Write every value as a vocabulary file."""
        write_vocabulary(filepath, self._tokens())

    def identity(self) -> dict[str, Any]:
        """Class, vocabulary size and sha256 of what determines the vocabulary, for manifests."""
        return identity_of(self, hashlib.sha256(b"integers 0..%d" % self._codec.max_value).hexdigest())


class IntegerTokenizer(_ValueTokenizer):
    """Whole numbers 0..max_value between white space: id = value + 1, vocabulary max_value + 2."""

    def __init__(self, max_value: int = 359, vocab_file: str | Path | None = None) -> None:
        """Raises ConfigError for max_value, MissingDataError or VocabularyError for the file."""
        if vocab_file is not None:
            max_value = _integer_vocabulary(vocab_file)
        if isinstance(max_value, bool) or not isinstance(max_value, int) or not 0 <= max_value < MAX_TOKEN_ID:
            raise ConfigError(f"max_value is {max_value!r}, expected a whole number from 0 to {MAX_TOKEN_ID - 1:,}")
        self.max_value = max_value
        super().__init__(IntegerCodec(max_value, "value"), end_of_document=b"")

    def encode_sequence(self, values: Sequence[int] | np.ndarray) -> list[int]:
        """Token ids of integers. Raises TokenizationError for one out of range or of another type."""
        return self.encode_values(values).tolist()

    def decode_sequence(self, tokens: Sequence[int]) -> list[int]:
        """Values of token ids, leaving out 0. Raises TokenizationError for an unknown id."""
        return self._codec.values_of_ids(tokens).tolist()


class AngleTokenizer(_ValueTokenizer):
    """Angles of 0..359 whole degrees between white space: id = angle + 1, vocabulary 361."""

    def __init__(self, vocab_file: str | Path | None = None) -> None:
        """`vocab_file`, if given, must hold the 360 angles. Raises MissingDataError or VocabularyError."""
        if vocab_file is not None and (found := _integer_vocabulary(vocab_file)) != 359:
            raise VocabularyError(
                f"{vocab_file}: holds 0 to {found}, but AngleTokenizer needs 0 to 359", remedy="Use type integer"
            )
        super().__init__(IntegerCodec(359, "angle"), end_of_document=b"\x00")

    def encode_angle_sequence(self, angles: Sequence[int] | np.ndarray) -> list[int]:
        """Token ids of integers. Raises TokenizationError for one out of range or of another type."""
        return self.encode_values(angles).tolist()

    def decode_angle_sequence(self, tokens: Sequence[int]) -> list[int]:
        """Angles of token ids, leaving out 0. Raises TokenizationError for an unknown id."""
        return self._codec.values_of_ids(tokens).tolist()

    def printTokens(self, tokens: Sequence[int]) -> None:
        """Write tokens with their ids to stdout."""
        write_tokens(self.idx2token, tokens)


def _integer_vocabulary(vocab_file: str | Path) -> int:
    """max_value of a vocabulary file in which id v + 1 is the decimal of v, or a VocabularyError."""
    tokens = parse_vocabulary(vocab_file)
    max_value = max(tokens) - 1
    for value in range(max_value + 1):
        if tokens.get(value + 1) != b"%d" % value:
            token = shortened(repr(tokens[value + 1])) if value + 1 in tokens else "missing"
            raise VocabularyError(
                f"{vocab_file}: id {value + 1} is {token}, expected '{value}' in a vocabulary of integers",
                remedy="Use type generic",
            )
    return max_value
