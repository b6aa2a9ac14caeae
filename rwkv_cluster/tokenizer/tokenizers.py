"""Tokenizers: text to token ids and back. Id 0 always means end of document and never comes out of text.

`ByteTokenizer` needs nothing and encodes everything; `IntegerTokenizer` and `AngleTokenizer` read numbers;
`GenericTokenizer` matches the tokens of a vocabulary file greedily, such as RWKV's World vocabulary. Any class
with `encode`, `decode` and `vocab_size` serves as well: `encode_to_array`, `tokenizer_identity` and
`save_vocab` take both kinds. Text that cannot be encoded is a TokenizationError with its byte position, never
a shorter result.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rwkv_cluster.errors import ConfigError, RWKVClusterError
from rwkv_cluster.tokenizer.base import BaseTokenizer, identity_of, utf8, write_tokens
from rwkv_cluster.tokenizer.integer import IntegerTokenizer
from rwkv_cluster.tokenizer.trie_matcher import build_matcher, id_dtype
from rwkv_cluster.tokenizer.vocabulary import (
    TokenizationError,
    parse_vocabulary,
    shortened,
    vocabulary_digest,
    write_vocabulary,
)
from rwkv_cluster.workdir import VOCABULARY


class ByteTokenizer(BaseTokenizer):
    """One token per byte of UTF-8: id = byte + 1. Encodes every text, vocabulary 257."""

    @property
    def vocab_size(self) -> int:
        """257: the bytes, and 0 for end of document."""
        return 257

    def encode(self, src: str) -> list[int]:
        """Token ids of a text."""
        return self.encode_to_array(src).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """Ids [n_bytes] of a text, uint16."""
        return self._ids(utf8(text))

    def encodeBytes(self, src: bytes) -> list[int]:
        """Token ids of any bytes."""
        return self._ids(src).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; each part that is not UTF-8 becomes U+FFFD."""
        return self.decodeBytes(tokens).decode("utf-8", "replace")

    def decodeBytes(self, tokens: Sequence[int]) -> bytes:
        """Bytes of token ids, without ids that are no byte."""
        ids = np.asarray(tokens, np.int64)
        return (ids[(ids > 0) & (ids < 257)] - 1).astype(np.uint8).tobytes()

    def save_vocab(self, filepath: str | Path) -> None:
        """Write the 256 bytes as a vocabulary file."""
        write_vocabulary(filepath, self._tokens().items())

    def identity(self) -> dict[str, Any]:
        """Class, vocabulary size and sha256 of the vocabulary, for manifests."""
        return identity_of(self, vocabulary_digest(self._tokens()))

    def _ids(self, data: bytes) -> np.ndarray:
        return np.add(np.frombuffer(data, np.uint8), 1, dtype=np.uint16)

    def _tokens(self) -> dict[int, bytes]:
        return {byte + 1: bytes([byte]) for byte in range(256)}


class GenericTokenizer(BaseTokenizer):
    """Greedy longest match over the UTF-8 bytes of a text, with the tokens of a vocabulary file.

    Id 0 is end of document even where the file gives it a spelling, so text is never encoded as 0. Pickling
    carries the tokens and not the trie, which is built again in about 0.05 s for 65,529 tokens; a forked
    process shares it.
    """

    def __init__(self, vocab_file: str | Path, added_tokens: Sequence[str] = (), *, n_rows: int = 0) -> None:
        """Read the file and add tokens.

        added_tokens: texts that are matched before all others, the longest first; those that the file lacks get the ids
        after its last one. n_rows: least vocab_size, where models have more rows than the file has ids. Raises
        MissingDataError or VocabularyError.
        """
        self.vocab_file = vocab_file
        self.added_tokens = tuple(added_tokens)
        self.n_rows = n_rows
        self.idx2token = parse_vocabulary(vocab_file)
        self.new_ids = self._add()
        self._prepare()

    def _add(self) -> range:
        """Give ids to the added tokens that have none. Returns them."""
        known = {token for token_id, token in self.idx2token.items() if token_id != 0}
        first = next_id = max(self.idx2token) + 1
        for token in map(utf8, self.added_tokens):
            if token not in known:
                self.idx2token[next_id] = token
                next_id += 1
        return range(first, next_id)

    def _prepare(self) -> None:
        self._vocab_size = max(self.n_rows, max(self.idx2token) + 1)
        self._dtype = id_dtype(self._vocab_size)
        self._matcher = build_matcher(self.idx2token)
        added = sorted(map(utf8, self.added_tokens), key=len, reverse=True)
        self._added = re.compile(b"|".join(map(re.escape, added))) if added else None

    def __getstate__(self) -> dict[str, Any]:
        names = ("vocab_file", "added_tokens", "n_rows", "idx2token", "new_ids")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, or n_rows where that is more."""
        return self._vocab_size

    @cached_property
    def token2idx(self) -> dict[bytes, int]:
        """The inverse of idx2token; a token that id 0 shares with another id has the other."""
        return {token: token_id for token_id, token in sorted(self.idx2token.items())}

    def encode(self, src: str) -> list[int]:
        """Token ids of a text. Raises TokenizationError where no token fits."""
        return self._ids(utf8(src)).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """Ids [n] of a text, uint16 or int32 by vocab_size. Raises TokenizationError with a position."""
        return self._ids(utf8(text))

    def encodeBytes(self, src: bytes) -> list[int]:
        """Token ids of any bytes. Raises TokenizationError where no token fits."""
        return self._ids(bytes(src)).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; the single character U+FFFD where their bytes are not UTF-8 as a whole."""
        try:
            return self.decodeBytes(tokens).decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd"

    def decodeBytes(self, tokens: Sequence[int]) -> bytes:
        """Bytes of token ids, without ids that the vocabulary lacks."""
        return self._matcher.decode(tokens)

    def save_vocab(self, filepath: str | Path) -> None:
        """Write the vocabulary file, ids ascending."""
        write_vocabulary(filepath, sorted(self.idx2token.items()))

    def identity(self) -> dict[str, Any]:
        """Class, vocabulary size, sha256 of the vocabulary and added tokens, for manifests."""
        return identity_of(self, vocabulary_digest(self.idx2token), self.added_tokens)

    @property
    def plain_size(self) -> int:
        """Largest id + 1 without the new tokens."""
        return self.new_ids.start

    def new_token_pieces(self) -> dict[int, list[int]]:
        """Ids of the pieces, by the file's tokens alone, of each new token by its id; or none."""
        tokens = self.idx2token
        plain = build_matcher({token_id: tokens[token_id] for token_id in tokens if token_id not in self.new_ids})
        return {token_id: plain.encode(tokens[token_id], self._dtype)[0].tolist() for token_id in self.new_ids}

    def printTokens(self, tokens: Sequence[int]) -> None:
        """Write tokens with their ids to stdout."""
        write_tokens(self.idx2token, tokens)

    def _ids(self, data: bytes) -> np.ndarray:
        if self._added is None:
            return self._matched(data, 0, len(data))
        parts, start = [], 0
        for added in self._added.finditer(data):
            parts += [self._matched(data, start, added.start()), self._matched(data, *added.span())]
            start = added.end()
        return np.concatenate([*parts, self._matched(data, start, len(data))])

    def _matched(self, data: bytes, start: int, end: int) -> np.ndarray:
        """Ids of data[start:end], which are the longest tokens from the left."""
        ids, position = self._matcher.encode(data[start:end], self._dtype)
        if position >= 0:
            position += start
            near = data[max(0, position - 16) : position + 16].decode("utf-8", "replace")
            raise TokenizationError(
                f"byte {position}: cannot encode 0x{data[position]:02x} near {near!r}, because no token of "
                f"{self.vocab_file} fits. Add one to the vocabulary, or remove it from the text",
                position,
            )
        return ids


def create_default_vocab_file(filepath: str | Path, max_value: int = 359) -> str | Path:
    """Write the vocabulary file of `IntegerTokenizer(max_value)` and return `filepath`."""
    IntegerTokenizer(max_value).save_vocab(filepath)
    return filepath


def require_tokenizer(tokenizer: Any, name: str) -> Any:
    """`tokenizer`, whatever its class. Raises ConfigError where it lacks what a tokenizer needs."""
    if isinstance(tokenizer, type):
        raise ConfigError(f"tokenizer is the class {name}, expected an object of it", remedy=f"Write {name}(...)")
    missing = [part for part in ("encode", "decode", "vocab_size") if not hasattr(tokenizer, part)]
    if missing:
        raise ConfigError(
            f"tokenizer {name} has no {' and no '.join(missing)}", remedy="Add what is missing to the class"
        )
    return tokenizer


def encode_to_array(tokenizer: Any, text: str) -> np.ndarray:
    """Ids [n] of a text by any tokenizer, uint16 or int32 by its vocab_size, without a final 0.

    Raises TokenizationError: for a built-in with the byte position, for a user's class where its encode
    raises a ValueError or returns anything but integers in [0, vocab_size).
    """
    if _has_array_encoder(type(tokenizer)):
        return tokenizer.encode_to_array(text)
    name = type(tokenizer).__qualname__
    try:
        ids = tokenizer.encode(text)
    except TokenizationError:
        raise
    except ValueError as error:
        raise TokenizationError(
            f"{name} cannot encode the text: {error}", getattr(error, "byte_position", None)
        ) from error
    array = np.asarray(ids)
    vocab_size = int(tokenizer.vocab_size)
    if not array.size:
        return np.empty(0, id_dtype(vocab_size))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TokenizationError(f"{name}.encode returned {shortened(repr(ids))}, expected a list of integers")
    if array.min() < 0 or array.max() >= vocab_size:
        index = int(np.argmax((array < 0) | (array >= vocab_size)))
        raise TokenizationError(
            f"{name}.encode returned id {array[index]} at index {index}, outside 0 to {vocab_size - 1}"
        )
    return array.astype(id_dtype(vocab_size))


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What tells this tokenizer from another in a manifest: class, vocab_size and a sha256.

    The sha256 of a user's class without `identity` covers its source file and what its `save_vocab` writes.
    """
    if hasattr(tokenizer, "identity"):
        return tokenizer.identity()
    digest = hashlib.sha256()
    with contextlib.suppress(TypeError, OSError):  # a class typed into an interpreter or notebook has no file
        digest.update(Path(inspect.getfile(type(tokenizer))).read_bytes())
    with TemporaryDirectory() as folder:
        save_vocab(tokenizer, Path(folder) / VOCABULARY)
        digest.update((Path(folder) / VOCABULARY).read_bytes())
    return identity_of(tokenizer, digest.hexdigest())


def save_vocab(tokenizer: Any, path: str | Path) -> None:
    """Write the vocabulary file of any tokenizer; only a comment where its class has no `save_vocab`."""
    if hasattr(tokenizer, "save_vocab"):
        tokenizer.save_vocab(path)
    else:
        BaseTokenizer.save_vocab(tokenizer, path)


def decode_for_display(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of what a model generated: `decode`, but a character cut off at the end does not cost the rest."""
    if hasattr(tokenizer, "decodeBytes"):
        return tokenizer.decodeBytes(tokens).decode("utf-8", "replace")
    return tokenizer.decode(tokens)


def _has_array_encoder(tokenizer_class: type) -> bool:
    """Whether encode_to_array says what encode says: a subclass may have overridden encode alone."""
    for base in tokenizer_class.__mro__:
        if "encode_to_array" in vars(base):
            return True
        if "encode" in vars(base):
            return False
    return False


def user_tokenizer(reference: str, vocab_file: Path | None) -> Any:
    """An object of the class that `package.module:ClassName` names. Raises ConfigError."""
    tokenizer_class = _user_class(reference)
    try:
        tokenizer = tokenizer_class() if vocab_file is None else tokenizer_class(vocab_file)
    except RWKVClusterError:
        raise
    except Exception as error:
        given = "without an argument" if vocab_file is None else f"with vocab_file {str(vocab_file)!r}"
        raise ConfigError(f"tokenizer {reference} cannot be made {given}: {type(error).__name__}: {error}") from error
    size = getattr(tokenizer, "vocab_size", None)
    if size is None:
        raise ConfigError(f"tokenizer {reference} has no vocab_size", remedy="Add what is missing to the class")
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ConfigError(f"tokenizer {reference} has a vocab_size of {size!r:.60}, expected an integer >= 1")
    return tokenizer


def _user_class(reference: str) -> Any:
    """The class that `package.module:ClassName` names, before anything of it is called. Raises ConfigError."""
    module_name, _, class_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        reason = str(error) if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"tokenizer type is '{reference}', but module {module_name!r} cannot be imported: {reason}",
            remedy="Install it, or put its folder on PYTHONPATH",
        ) from error
    attribute = getattr(module, class_name, None)
    if attribute is None:
        raise ConfigError(f"tokenizer type is '{reference}', but module {module_name} has no class {class_name!r}")
    if not isinstance(attribute, type):
        raise ConfigError(
            f"tokenizer type is '{reference}', which is a {type(attribute).__name__} and no class",
            remedy="Name a class with encode, decode and vocab_size",
        )
    missing = [name for name in ("encode", "decode") if not callable(getattr(attribute, name, None))]
    if missing:
        raise ConfigError(
            f"tokenizer {reference} has no {' and no '.join(missing)}", remedy="Add what is missing to the class"
        )
    return attribute
