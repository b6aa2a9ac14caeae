"""Vocabulary files: one token a line, `<id> <string or bytes literal> <length in bytes>`.

The grammar is that of RWKV-LM's `rwkv_vocab_v20230424.txt`: the id ends at the first space, the length begins
after the last one, and the literal between them is a Python `str` (meaning its UTF-8) or `bytes` literal.
RWKV-LM evaluates that literal as Python code; here it is matched as one literal and never executed. Blank
lines and lines that start with `#` are skipped; a line ends in LF or CRLF.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.workdir import atomic_writer

MAX_TOKEN_ID = 2**23 - 1
MAX_TOKEN_BYTES = 65_535
MAX_LINE_CHARACTERS = 10 * MAX_TOKEN_BYTES + 64  # the longest literal spells each character as \\UXXXXXXXX

_NUMBER = re.compile(r"[0-9]{1,10}")
_LITERAL = re.compile(
    r"([uUbBrR]|[bB][rR]|[rR][bB])?"
    r"""(?:'([^'\\\r\n]*(?:\\[^\r\n][^'\\\r\n]*)*)'|"([^"\\\r\n]*(?:\\[^\r\n][^"\\\r\n]*)*)")"""
)


class VocabularyError(DataError):
    """A vocabulary file is malformed. `line` is the faulty line's number from 1; None: the whole file."""

    def __init__(self, what: str, line: int | None = None, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.line = line


class TokenizationError(DataError):
    """Text or values that the tokenizer has no ids for. `byte_position` counts the text's UTF-8 bytes from 0.

    It is None where the input was a sequence of values or ids. The message names no document: who has one
    puts it in front.
    """

    def __init__(self, what: str, byte_position: int | None = None, *, remedy: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.byte_position = byte_position


class _Fault(Exception):
    """What is wrong with one line, before file name and line number are known."""


def parse_vocabulary(path: str | Path) -> dict[int, bytes]:
    """Read a vocabulary file into {id: token bytes}, in the file's order.

    Ids may have gaps. Every token is unique and 1 to 65,535 bytes long; only id 0, which always means end of
    document, may be empty or repeat another token, because no text is ever encoded as 0.
    Raises MissingDataError when there is no such file and VocabularyError, with `path:line`, for every fault.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would never end
            raise DataError(f"vocabulary file {path} is not a regular file", remedy="Name the file itself")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingDataError(f"vocabulary file {path} does not exist", remedy="Check the path") from error
    except OSError as error:
        raise DataError(f"vocabulary file {path} cannot be read: {error.strerror}") from error
    return parse_vocabulary_lines(content.split(b"\n"), str(path))


def parse_vocabulary_lines(lines: Iterable[bytes], name: str) -> dict[int, bytes]:
    """`parse_vocabulary` on the lines of a file called `name` in messages."""
    tokens: dict[int, bytes] = {}
    id_lines: dict[int, int] = {}
    token_lines: dict[bytes, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '\d' in a literal: Python keeps the backslash, and so do we
        for number, line in enumerate(lines, start=1):
            try:
                entry = parse_vocabulary_line(line, first=number == 1)
                if entry is None:
                    continue
                token_id, token = entry
                if token_id in tokens:
                    raise _Fault(f"id {token_id} is taken by line {id_lines[token_id]}. Give each token its own id")
                if token_id != 0 and token in token_lines:
                    raise _Fault(f"{_shown(token)} is already on line {token_lines[token]}. Remove one of them")
            except _Fault as fault:
                raise VocabularyError(f"{name}:{number}: {fault}", number) from fault.__cause__
            tokens[token_id], id_lines[token_id] = token, number
            if token_id != 0:
                token_lines[token] = number
    if not token_lines:
        raise VocabularyError(f"{name}: no token in it", remedy="A vocabulary line reads: 1 'a' 1")
    return tokens


def parse_vocabulary_line(line: bytes, *, first: bool = False) -> tuple[int, bytes] | None:
    """(id, token) of one line without its line feed; None for a blank line or a comment."""
    if len(line) > 4 * MAX_LINE_CHARACTERS:
        raise _Fault(f"the line is {len(line):,} bytes long, more than any token of {MAX_TOKEN_BYTES:,} bytes needs")
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise _Fault(f"byte {error.start + 1} of the line is not UTF-8. Save the file as UTF-8") from error
    if not text or text.startswith("#"):
        return None
    id_text, _, rest = text.partition(" ")
    literal, _, length_text = rest.rpartition(" ")
    if not (_NUMBER.fullmatch(id_text) and _NUMBER.fullmatch(length_text)):
        raise _Fault(f"found {shortened(text)}, expected an id, a quoted token and its length in bytes, as in: 1 'a' 1")
    token_id, token, length = int(id_text), _literal_bytes(literal.strip()), int(length_text)
    if token_id > MAX_TOKEN_ID:
        raise _Fault(f"id {token_id} is too large. The largest id is {MAX_TOKEN_ID}")
    if len(token) != length:
        raise _Fault(f"token {_shown(token)} is {len(token)} bytes long, but the line says {length}. Correct one")
    if len(token) > MAX_TOKEN_BYTES:
        raise _Fault(f"the token is {len(token):,} bytes long. The longest allowed is {MAX_TOKEN_BYTES:,}")
    if not token and token_id != 0:
        raise _Fault("the token is empty, which only id 0 (end of document) may be. Remove the line")
    return token_id, token


def _literal_bytes(literal: str) -> bytes:
    """Bytes that one Python string or bytes literal stands for; nothing else is accepted or executed."""
    parts = _LITERAL.fullmatch(literal)
    if parts is None:
        raise _Fault(f"{shortened(literal)} is not one quoted string, such as 'a', \"a\" or b'\\xff'")
    prefix, body = (parts[1] or "").lower(), parts[2] if parts[2] is not None else parts[3]
    if "\\" not in body and "\0" not in body and (body.isascii() or "b" not in prefix):
        value: str | bytes = body.encode("ascii") if "b" in prefix else body
    else:
        try:
            value = ast.literal_eval(literal)
        except (SyntaxError, ValueError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise _Fault(f"{shortened(literal)} is not a valid literal: {reason}") from error
    if isinstance(value, bytes):
        return value
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Fault(
            f"{shortened(literal)} holds half a surrogate pair, which has no UTF-8. Write it as b'...'"
        ) from error


def vocabulary_line(token_id: int, token: bytes) -> str:
    """One line of a vocabulary file with its line feed: a `str` literal for a UTF-8 token, else `bytes`."""
    try:
        literal = repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        literal = repr(token)
    return f"{token_id} {literal} {len(token)}\n"


def write_vocabulary(path: str | Path, entries: Iterable[tuple[int, bytes]]) -> None:
    """Write (id, token) pairs, in the order given, as a vocabulary file that appears whole or not at all."""
    with atomic_writer(Path(path)) as handle:
        for token_id, token in entries:
            handle.write(vocabulary_line(token_id, token).encode("utf-8"))


def create_vocab_file_from_tokens(tokens: Sequence[str | bytes], filepath: str | Path) -> None:
    r"""Write a vocabulary file that gives `tokens` the ids 1, 2, ... and begins with id 0 as `b'\x00'`.

    Raises VocabularyError, before anything is written, where such a file could not be loaded again.
    """
    lines = ["0 b'\\x00' 1\n"]
    for token_id, token in enumerate(tokens, start=1):
        if not isinstance(token, str | bytes):
            raise VocabularyError(
                f"token {token_id} is of type {type(token).__name__}", remedy="Tokens are str or bytes"
            )
        size = len(token) if isinstance(token, bytes) else len(token.encode("utf-8", "surrogatepass"))
        lines.append(f"{token_id} {token!r} {size}\n")
    encoded = [line.encode("utf-8") for line in lines]
    parse_vocabulary_lines((line[:-1] for line in encoded), str(filepath))
    with atomic_writer(Path(filepath)) as handle:
        handle.writelines(encoded)


def vocabulary_digest(tokens: Mapping[int, bytes]) -> str:
    """Hexadecimal sha256 of what a vocabulary says: each id, length and token, by ascending id."""
    digest = hashlib.sha256()
    for token_id in sorted(tokens):
        token = tokens[token_id]
        digest.update(b"%d %d " % (token_id, len(token)) + token)
    return digest.hexdigest()


def _shown(token: bytes) -> str:
    try:
        return shortened(repr(token.decode("utf-8")))
    except UnicodeDecodeError:
        return shortened(repr(token))


def shortened(text: str) -> str:
    """`text`, or its beginning and its length where it is too long for a message."""
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"
