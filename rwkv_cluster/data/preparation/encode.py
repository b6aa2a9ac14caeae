"""Encode documents to token ids: the work of one process on a block of lines or a group of files.

Every document ends with token 0. Values (arrays, lists in JSONL) mean what the tokenizer says: integer and angle
tokenizers map value v to id v + 1; for every other tokenizer they are token ids already, and a final 0 that is there
is not doubled. But an array of uint8 holds bytes: the byte tokenizer maps them to byte + 1, as it does with text.

Where rows of JSONL say what is not trained on, their documents consist of marked tokens: see `marked_tokens`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rwkv_cluster.data.conversations.row_format import TEXT_ROWS, RowRules
from rwkv_cluster.data.conversations.schemas import read_conversation
from rwkv_cluster.data.inputs.bad_lines import FIX, BadLine
from rwkv_cluster.data.inputs.labelled_tokens import read_labelled
from rwkv_cluster.data.inputs.readers import (
    LineBlock,
    Values,
    decode_text,
    document_blocks,
    parse_line,
    parse_object,
    refuse_lone_surrogates,
)
from rwkv_cluster.data.inputs.refused_formats import fill_in
from rwkv_cluster.data.inputs.sources import Source
from rwkv_cluster.data.preparation import marked_tokens
from rwkv_cluster.errors import DataError
from rwkv_cluster.tokenizer import (
    AngleTokenizer,
    ByteTokenizer,
    IntegerTokenizer,
    TokenizationError,
    encode_to_array,
    id_dtype,
    is_built_in,
)

LARGE_TEXT_BYTES = 16 << 20  # a larger file is encoded piece by piece, by one process
_SHOWN_BAD_LINES = 3
_NO_BYTES = b""
_TRAINED_END, _UNTRAINED_END = (marked_tokens.marked(np.zeros(1, np.int32), trained) for trained in (True, False))


@dataclass(frozen=True)
class FileBlock:
    """Text files for one worker, each with its number among all sources."""

    files: tuple[tuple[int, Source], ...]


@dataclass(frozen=True)
class LargeFile:
    """A text file that is too large for `encode_files`; the caller streams it."""

    number: int
    source: Source


@dataclass
class Encoded:
    """Documents as token ids, in input order.

    tokens: 1-D, of the token file's dtype or marked, each document with its final 0. lengths: [n] int64. digests: [n]
    uint64 when there is a validation split. jsonl: the documents as lines. contents: sha256 of the sources that were
    read whole.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray | None = None
    jsonl: bytes = _NO_BYTES
    n_empty: int = 0
    n_bad_lines: int = 0
    bad_lines: list[str] = field(default_factory=list)
    contents: list[tuple[int, str]] = field(default_factory=list)


class DocumentDigest:
    """64 bits that are equal for documents of equal tokens (without the final 0) and depend on the seed."""

    def __init__(self, key: bytes) -> None:
        self._hash = hashlib.blake2b(key=key, digest_size=8)

    def update(self, ids: np.ndarray) -> None:
        """Take the next tokens in."""
        self._hash.update(np.ascontiguousarray(ids).data)

    def value(self) -> int:
        """The digest of all tokens so far."""
        return int.from_bytes(self._hash.digest(), "little")


class DocumentEncoder:
    """Encodes documents for one token file. Holds no state: copies of it in worker processes give the same result.

    digest_key: seed of the documents' digests, or None without a validation split. with_jsonl: also give the documents
    as JSONL, for inputs that are not JSONL yet. rows: what the rows of JSONL files are, by default text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        text_field: str = "text",
        skip_bad_lines: bool = False,
        digest_key: int | None = None,
        with_jsonl: bool = False,
        rows: RowRules = TEXT_ROWS,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = int(tokenizer.vocab_size)
        self.dtype = np.dtype(id_dtype(self.vocab_size))
        self.stored_dtype = marked_tokens.DTYPE if rows.have_marks else self.dtype
        self._rows = rows
        self.with_jsonl = with_jsonl
        self._text_field = text_field
        self._skip_bad_lines = skip_bad_lines
        self._digest_key = None if digest_key is None else digest_key.to_bytes(8, "little")
        self._offset = 1 if isinstance(tokenizer, IntegerTokenizer | AngleTokenizer) else 0
        self._row_encoders = {
            "text": self._encode_text_row,
            "conversations": self._encode_conversation_row,
            "tokens": self._encode_token_row,
        }
        self._trusted = is_built_in(tokenizer)
        self._encode = tokenizer.encode_to_array if self._trusted else partial(encode_to_array, tokenizer)

    def encode_text(self, text: str, place: str) -> np.ndarray:
        """Ids of a text, without a final 0. Raises DataError that begins with `place` and names the byte."""
        try:
            ids = self._encode(text)
        except TokenizationError as error:
            raise DataError(error.what, where=place, remedy=error.remedy) from error
        if not self._trusted:
            self._check_ids(ids, place)
        return ids

    def encode_list(self, values: list[int], place: str) -> np.ndarray:
        """Ids of a list of integers from JSONL, without a final 0."""
        try:
            array = np.array(values, np.int64)
        except OverflowError:
            index = next(index for index, value in enumerate(values) if not -(2**63) <= value < 2**63)
            raise DataError(f"{place}: index {index}: {str(values[index])[:20]}... is out of range") from None
        ids = self.encode_values(Values(place, array.reshape(1, -1), 0, one_dimensional=True))[0]
        return ids[:-1] if not self._offset and len(ids) and ids[-1] == 0 else ids

    def encode_values(self, values: Values, final_zero: bool = False) -> np.ndarray:
        """Ids [n, L] of rows of values, or [n, L + 1] with the final 0."""
        rows = values.rows
        offset = self._offset_of(values)
        values.check_whole()
        values.check_range(self.vocab_size - 1 - offset, "values" if offset else "token ids")
        ids = np.zeros((len(rows), rows.shape[1] + final_zero), self.dtype)
        np.add(rows, offset, out=ids[:, : rows.shape[1]], dtype=self.dtype, casting="unsafe")  # in range: checked
        return ids

    def _offset_of(self, values: Values) -> int:
        """What is added to values to make them ids. Raises DataError for bytes that cannot be ids."""
        if self._offset or values.rows.dtype != np.uint8 or self.vocab_size <= 256:
            return self._offset
        if isinstance(self.tokenizer, ByteTokenizer):
            return 1
        raise DataError(
            f"{values.name} holds bytes (uint8), and this tokenizer has ids up to {self.vocab_size - 1}",
            remedy="Write text as a .txt file; if these are token ids, convert them with astype('int32')",
        )

    def encode_rows(self, values: Values) -> Encoded:
        """Each row of values as a document."""
        ids = self.encode_values(values, final_zero=True)
        lengths = np.full(len(ids), ids.shape[1], np.int64)
        if not self._offset_of(values) and (ids[:, -2] == 0).any():
            encoded = self._collect([row[:-1] if row[-2] == 0 else row for row in ids], terminated=True)
        else:
            encoded = Encoded(ids.reshape(-1), lengths, self._digests(ids[:, :-1]))
        if self.with_jsonl:
            encoded.jsonl = b"".join(map(values_line, np.asarray(values.rows)))
        return encoded

    def encode_lines(self, block: LineBlock) -> Encoded:
        """The documents of a block of JSONL lines."""
        documents: list[np.ndarray] = []
        bad: list[str] = []
        n_empty, name, remedy = 0, str(block.path), FIX
        encode_row = self._row_encoders[self._rows.format_of(block.path)]
        if block.too_long:
            bad.append(f"{name}:{block.first_line}: is longer than 32 MiB")
        for number, line in block.lines():
            try:
                document = encode_row(line, f"{name}:{number}")
            except BadLine as error:
                bad.append(f"{name}:{number}: {error}")
                remedy = fill_in(error.remedy, block.path)
                if not self._skip_bad_lines:
                    break
                continue
            if document is None:
                n_empty += 1
            else:
                documents.append(document)
        if bad and not self._skip_bad_lines:
            raise DataError(f"{bad[0]}", remedy=remedy)
        encoded = self._collect(documents, terminated=self._rows.have_marks)
        encoded.n_empty, encoded.n_bad_lines = encoded.n_empty + n_empty, len(bad)
        encoded.bad_lines = bad[:_SHOWN_BAD_LINES]
        return encoded

    def _encode_text_row(self, line: bytes, place: str) -> np.ndarray | None:
        """A row's document, with its final 0 where rows have marks; None for an empty one. Raises BadLine."""
        value = parse_line(line, self._text_field)
        if not value or (isinstance(value, str) and value.isspace()):
            return None
        ids = self.encode_text(value, place) if isinstance(value, str) else self.encode_list(value, place)
        return marked_tokens.marked(np.append(ids, 0), True) if self._rows.have_marks else ids

    def _encode_token_row(self, line: bytes, place: str) -> np.ndarray | None:
        """The same of a row of tokens with labels or a mask. Raises BadLine."""
        values, trained = read_labelled(parse_object(line, "input_ids"))
        if not values:
            return None
        ids, ends = self.encode_list(values, place), self._offset == 0 and values[-1] == 0
        bits = trained if ends else np.append(trained, trained[-1])
        return marked_tokens.marked(np.append(ids, 0), bits)

    def _encode_conversation_row(self, line: bytes, place: str) -> np.ndarray | None:
        """The same of a row with a conversation. Raises BadLine, also where there is no answer to train on."""
        conversation = read_conversation(parse_object(line, "messages"), self._text_field)
        assert self._rows.template is not None
        pieces = self._rows.template.pieces(conversation)
        if self._rows.answers_only and not any(trained for _, trained in pieces):
            raise BadLine("has no answer of an assistant to train on")
        refuse_lone_surrogates(line, [text for text, _ in pieces], "a turn")
        encoded = [self.encode_text(text, place) for text, _ in pieces]
        if not self._rows.have_marks:
            return np.concatenate(encoded)
        every = not self._rows.answers_only
        end = _TRAINED_END if every or conversation.ends_with_answer else _UNTRAINED_END
        parts = [
            ids if every or trained else marked_tokens.untrained(ids)
            for ids, (_, trained) in zip(encoded, pieces, strict=True)
        ]
        return np.concatenate([*parts, end])

    def encode_files(self, block: FileBlock) -> list[Encoded | LargeFile]:
        """One document for each text file, or LargeFile where a file exceeds LARGE_TEXT_BYTES."""
        results: list[Encoded | LargeFile] = []
        for number, source in block.files:
            digest = hashlib.sha256()
            content = _read_limited(document_blocks(source, digest), LARGE_TEXT_BYTES)
            if content is None:
                results.append(LargeFile(number, source))
                continue
            encoded = self._encode_file(content, source)
            encoded.contents = [(number, digest.hexdigest())]
            results.append(encoded)
        return list(_merged(results))

    def _encode_file(self, content: bytes, source: Source) -> Encoded:
        try:
            text = decode_text(content, source.path)
        except DataError:
            if not source.optional:
                raise
            text = ""
        if not text or text.isspace():
            return Encoded(np.empty(0, self.dtype), np.empty(0, np.int64), self._digests([]), n_empty=1)
        encoded = self._collect([self.encode_text(text, str(source.path))])
        if self.with_jsonl:
            encoded.jsonl = text_line(text)
        return encoded

    @property
    def has_digests(self) -> bool:
        """Whether documents get a digest, for a validation split."""
        return self._digest_key is not None

    def new_digest(self) -> DocumentDigest:
        """Digest of a document that comes in pieces."""
        return DocumentDigest(self._digest_key or b"")

    def _digests(self, documents: Iterable[np.ndarray]) -> np.ndarray | None:
        if not self.has_digests:
            return None
        digests = []
        for document in documents:
            digest = self.new_digest()
            digest.update(marked_tokens.plain_ids(document, self.dtype))
            digests.append(digest.value())
        return np.array(digests, np.uint64)

    def _collect(self, documents: list[np.ndarray], terminated: bool = False) -> Encoded:
        """Put documents back to back; each gets a final 0 unless it has one. Those without a token are left out."""
        nonempty = [document for document in documents if len(document) > terminated]
        n_empty = len(documents) - len(nonempty)
        bare = [document[:-1] for document in nonempty] if terminated else nonempty
        lengths = np.fromiter(map(len, bare), np.int64, len(bare)) + 1
        tokens = np.empty(int(lengths.sum()), self.stored_dtype)
        zero = np.zeros(1, self.dtype)
        parts = nonempty if terminated else [part for document in bare for part in (document, zero)]
        if parts:
            np.concatenate(parts, out=tokens, casting="unsafe")
        return Encoded(tokens, lengths, self._digests(bare), n_empty=n_empty)

    def _check_ids(self, ids: np.ndarray, place: str) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            index = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            raise DataError(
                f"{place}: token {index}: the tokenizer gave id {ids[index]}, but its vocab_size is {self.vocab_size}",
                remedy="Correct the tokenizer",
            )


def values_line(values: np.ndarray) -> bytes:
    """The JSONL line of a row of values: `{"text": "0 45 90"}`."""
    whole = values if values.dtype.kind in "iu" else values.astype(np.int64)
    return ('{"text": "' + " ".join(map(str, whole.tolist())) + '"}\n').encode()


def text_line(text: str) -> bytes:
    """The JSONL line of a text, ASCII-escaped."""
    return (json.dumps({"text": text}) + "\n").encode()


def _read_limited(blocks: Iterable[bytes], limit: int) -> bytes | None:
    """The blocks joined, or None when they exceed `limit` bytes."""
    pieces, size = [], 0
    for block in blocks:
        pieces.append(block)
        size += len(block)
        if size > limit:
            return None
    return b"".join(pieces)


def _merged(results: list[Encoded | LargeFile]) -> Iterable[Encoded | LargeFile]:
    """Neighbouring results as one, so that little travels between processes."""
    run: list[Encoded] = []
    for result in results:
        if isinstance(result, LargeFile):
            yield from _joined(run)
            run = []
            yield result
        else:
            run.append(result)
    yield from _joined(run)


def _joined(run: list[Encoded]) -> Iterable[Encoded]:
    if not run:
        return
    digests = [encoded.digests for encoded in run if encoded.digests is not None]
    yield Encoded(
        tokens=np.concatenate([encoded.tokens for encoded in run]),
        lengths=np.concatenate([encoded.lengths for encoded in run]),
        digests=np.concatenate(digests) if digests else None,
        jsonl=b"".join(encoded.jsonl for encoded in run),
        n_empty=sum(encoded.n_empty for encoded in run),
        contents=[content for encoded in run for content in encoded.contents],
    )
