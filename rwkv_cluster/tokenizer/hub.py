"""Tokenizers of the Hugging Face Hub: a `tokenizer.json`, read by the package `tokenizers` (extra: hf).

Ids are those of `Tokenizer.encode(text, add_special_tokens=False)`: nothing is put before or after a text, cut or
padded, whatever the file asks for. Id 0 ends a document, so it has to be a special token or unused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_cluster.errors import ConfigError, DataError, MissingDataError
from rwkv_cluster.tokenizer.base import BaseTokenizer, identity_of, utf8
from rwkv_cluster.tokenizer.trie_matcher import id_dtype
from rwkv_cluster.tokenizer.vocabulary import MAX_TOKEN_ID, TokenizationError, VocabularyError, shortened
from rwkv_cluster.workdir import HUB_TOKENIZER, atomic_write

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")


class HubTokenizer(BaseTokenizer):
    """The tokenizer of a `tokenizer.json`. Pickling carries the file's content."""

    def __init__(self, path: str | Path, added_tokens: Sequence[str] = ()) -> None:
        """Read the file and add tokens.

        path: the file, or a folder with one. added_tokens: texts that are one token each; those that the file lacks get
        the ids after its last one. Raises MissingDataError, VocabularyError, or ConfigError without `tokenizers`.
        """
        self.path = path
        self.added_tokens = tuple(added_tokens)
        self._content, self._file = _read(Path(path))
        self._prepare()

    def _prepare(self) -> None:
        self._tokenizer = _parsed(self._content, self._file)
        _require_end_of_document(self._tokenizer, self._file)
        known = self._tokenizer.get_vocab()
        _add(self._tokenizer, self.added_tokens)
        vocabulary = self._tokenizer.get_vocab()
        last = max(vocabulary.values(), default=0)
        if not 1 <= last <= MAX_TOKEN_ID:
            raise VocabularyError(f"{self._file}: its largest id is {last}, expected 1 to {MAX_TOKEN_ID}")
        self.plain_size = max(known.values(), default=0) + 1
        self.new_ids = sorted(vocabulary[token] for token in vocabulary.keys() - known.keys())
        if not set(self.new_ids).isdisjoint(known.values()):
            raise VocabularyError(
                f"{self._file}: its ids have gaps, which added_tokens would fill", remedy="Add the tokens to that file"
            )
        self._vocab_size = last + 1
        self._dtype = id_dtype(self._vocab_size)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "added_tokens", "_content", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return self._vocab_size

    def encode(self, src: str) -> list[int]:
        """Token ids of a text. Raises TokenizationError where one would be 0."""
        utf8(src)
        encoding = self._tokenizer.encode(src, add_special_tokens=False)
        if 0 in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(0)]
            position = len(src[:start].encode())
            raise TokenizationError(
                f"byte {position}: the tokenizer makes id 0 of {shortened(repr(src[start:end]))}, which ends a "
                "document. Remove it from the text",
                position,
            )
        return encoding.ids

    def encode_to_array(self, text: str) -> np.ndarray:
        """Ids [n] of a text, uint16 or int32 by vocab_size. Raises TokenizationError with a position."""
        return np.array(self.encode(text), self._dtype)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens included, without 0 and ids that the vocabulary lacks."""
        ids = [int(token) for token in tokens if 0 < token < self._vocab_size]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def save_vocab(self, filepath: str | Path) -> None:
        """Write the file as it was read, without added_tokens."""
        atomic_write(Path(filepath), self._content)

    def exported(self) -> bytes:
        """Content of a tokenizer.json for other programs: the file as it was read, or with its added tokens."""
        return self._tokenizer.to_str(pretty=True).encode() if self.added_tokens else self._content

    def identity(self) -> dict[str, Any]:
        """Class, vocabulary size, sha256 of what the file says and added tokens, for manifests."""
        said = json.dumps(json.loads(self._content), sort_keys=True, separators=(",", ":"))
        return identity_of(self, hashlib.sha256(said.encode()).hexdigest(), self.added_tokens)

    def new_token_pieces(self) -> dict[int, list[int]]:
        """Ids of the pieces, by the file's tokens alone, of each new token by its id."""
        plain = _parsed(self._content, self._file)
        texts = {token_id: self._tokenizer.id_to_token(token_id) for token_id in self.new_ids}
        return {token_id: plain.encode(text, add_special_tokens=False).ids for token_id, text in texts.items()}


def _read(path: Path) -> tuple[bytes, Path]:
    """Content of a tokenizer.json and the file's own path. Raises MissingDataError or DataError."""
    file = path / HUB_TOKENIZER if path.is_dir() else path
    try:
        if file.exists() and not file.is_file():  # a pipe would never end
            raise DataError(f"{file} is not a regular file", remedy="Name a tokenizer.json, or a folder with one")
        return file.read_bytes(), file
    except FileNotFoundError as error:
        if file == path:
            raise MissingDataError(f"tokenizer {path} does not exist", remedy="Check the path") from error
        raise MissingDataError(
            f"folder {path} has no {HUB_TOKENIZER}",
            remedy="Name a folder with one, or use type world where it is one of RWKV's vocabulary",
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _parsed(content: bytes, file: Path) -> Tokenizer:
    """The tokenizer that the bytes of a tokenizer.json describe. Raises VocabularyError or ConfigError."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"tokenizer type is 'hf', but the package tokenizers cannot be imported: {error}",
            remedy="`pip install 'rwkv-cluster[hf]'` installs it",
        ) from error
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        begins = shortened(repr(content[:30].decode("utf-8", "replace")))
        raise VocabularyError(f"{file} is not JSON: it begins with {begins}", remedy="Get the file again") from error
    model = record.get("model") if isinstance(record, dict) else None
    if not isinstance(model, dict):
        raise VocabularyError(
            f'{file} is JSON, but no tokenizer: it has no "model"', remedy=f"Name a file such as {HUB_TOKENIZER}"
        )
    if (kind := model.get("type", _MODELS[0])) not in _MODELS:
        raise VocabularyError(
            f"{file}: its model is of type {shortened(repr(kind))}, which the package tokenizers does not have",
            remedy="Use type world where it is RWKV's vocabulary",
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises nothing narrower
        raise VocabularyError(
            f"{file} is damaged, or of a newer version than the package tokenizers {tokenizers.__version__}: "
            f"{str(error)[:100]}",
            remedy="Get the file again, or a newer package",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _require_end_of_document(tokenizer: Tokenizer, file: Path) -> None:
    """Raises VocabularyError where id 0 is a token of text."""
    special = tokenizer.get_added_tokens_decoder().get(0)
    token = tokenizer.id_to_token(0)
    if token is not None and not (special is not None and special.special):
        raise VocabularyError(
            f"{file}: id 0 is {shortened(repr(token))}, a token of text, and here id 0 ends a document",
            remedy="Use one whose id 0 is a special token, as when it is trained with special_tokens=['<|endoftext|>']",
        )


def _add(tokenizer: Tokenizer, added_tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    for text in added_tokens:
        utf8(text)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added_tokens])
