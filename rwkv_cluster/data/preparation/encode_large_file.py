"""One text file larger than memory, encoded piece by piece into the same ids as the whole.

A text may be cut where a tokenizer cannot notice: for bytes between any two characters, for integers at white space,
and for a greedy vocabulary after a token that begins at least a longest token's length before the end of the piece
(what follows cannot change it). A tokenizer of another class gets the whole text at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.data.inputs.readers import not_utf8
from rwkv_cluster.errors import DataError
from rwkv_cluster.tokenizer import ByteTokenizer, GenericTokenizer, IntegerTokenizer, TokenizationError, encode_to_array

Encode = Callable[[str, bool], tuple[np.ndarray, str]]  # (text, is the last) -> ids, the text left over

_ASCII_SPACE = " \t\n\v\f\r"


def encode_large_text(tokenizer: Any, blocks: Iterator[bytes], path: Path) -> Iterator[tuple[np.ndarray, str]]:
    """(ids, text) pieces of a UTF-8 text that comes in blocks; ids and texts concatenated are those of the whole.

    Raises DataError naming the file and the byte.
    """
    encode, rest, position = _piecewise(tokenizer), "", 0
    for text, last in _with_last(_characters(blocks, path)):
        piece = rest + text
        try:
            ids, rest = encode(piece, last)
        except TokenizationError as error:
            where = getattr(error, "byte_position", None)
            place = f"{path}" if where is None else f"{path}: byte {position + where} of the file"
            raise DataError(error.what, where=place, remedy=error.remedy) from error
        used = piece[: len(piece) - len(rest)]
        position += len(used.encode())
        yield ids, used


def _characters(blocks: Iterator[bytes], path: Path) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    first = True
    for block in blocks:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise not_utf8(path, position - pending + error.start) from None
        position += len(block)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield text
    if pending := len(decoder.getstate()[0]):
        raise not_utf8(path, position - pending)


def _with_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    for text in texts:
        yield text, False
    yield "", True


def _piecewise(tokenizer: Any) -> Encode:
    if type(tokenizer) is ByteTokenizer:
        return lambda text, last: (tokenizer.encode_to_array(text), "")
    if type(tokenizer) is IntegerTokenizer:
        return lambda text, last: _encode_words(tokenizer, text, last)
    if type(tokenizer) is GenericTokenizer:
        return _GreedyPieces(tokenizer)
    return _WholeText(tokenizer)


def _encode_words(tokenizer: IntegerTokenizer, text: str, last: bool) -> tuple[np.ndarray, str]:
    cut = len(text) if last else max(text.rfind(space) for space in _ASCII_SPACE) + 1
    return tokenizer.encode_to_array(text[:cut]), text[cut:]


class _WholeText:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []

    def __call__(self, text: str, last: bool) -> tuple[np.ndarray, str]:
        self._texts.append(text)
        return encode_to_array(self._tokenizer, "".join(self._texts) if last else ""), ""


class _GreedyPieces:
    def __init__(self, tokenizer: GenericTokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths = np.zeros(tokenizer.vocab_size, np.int64)
        for token_id, token in tokenizer.idx2token.items():
            self._lengths[token_id] = len(token)
        # with added tokens, which go first, what a token is may also depend on one that begins within its reach
        self._longest = int(self._lengths.max()) * (2 if tokenizer.added_tokens else 1)

    def __call__(self, text: str, last: bool) -> tuple[np.ndarray, str]:
        if last:
            return self._tokenizer.encode_to_array(text), ""
        data = text.encode()
        ids, data = self._encode_as_far_as_known(data)
        ends = np.cumsum(self._lengths[ids])
        starts = ends - self._lengths[ids]
        certain = int(np.searchsorted(starts, len(data) - self._longest, side="right"))
        while certain and ends[certain - 1] < len(data) and data[ends[certain - 1]] & 0xC0 == 0x80:
            certain -= 1  # a token may end within a character, a piece may not
        used = int(ends[certain - 1]) if certain else 0
        return ids[:certain], text[len(data[:used].decode()) :]

    def _encode_as_far_as_known(self, data: bytes) -> tuple[np.ndarray, bytes]:
        """A fault within the last token's reach may only come from the cut: it is left to the next piece."""
        size = len(data)
        while True:
            try:
                return self._tokenizer.encode_to_array(data.decode()), data
            except TokenizationError as error:
                if error.byte_position is None or error.byte_position < size - self._longest:
                    raise
                cut = error.byte_position
                while cut and data[cut] & 0xC0 == 0x80:
                    cut -= 1
                data = data[:cut]
