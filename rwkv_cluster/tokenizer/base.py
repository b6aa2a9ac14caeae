"""What every tokenizer offers, and the small parts that the built-in ones share."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_cluster.tokenizer.vocabulary import TokenizationError
from rwkv_cluster.workdir import atomic_write


class BaseTokenizer(ABC):
    """A tokenizer: a subclass needs the three abstract members, and id 0 must mean end of document."""

    @abstractmethod
    def encode(self, src: str) -> list[int]:
        """Token ids of a text, without a final 0."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Largest id + 1."""

    def save_vocab(self, filepath: str | Path) -> None:
        """Write the vocabulary file; here only a comment, as an unknown class's tokens cannot be listed."""
        atomic_write(Path(filepath), f"# {class_name(self)}, {self.vocab_size} ids\n".encode())


def class_name(tokenizer: Any) -> str:
    """Name of a tokenizer's class for messages and manifests; with its module where it is a user's."""
    kind = type(tokenizer)
    return (
        kind.__qualname__ if kind.__module__.startswith("rwkv_cluster.") else f"{kind.__module__}:{kind.__qualname__}"
    )


def identity_of(tokenizer: Any, digest: str, added_tokens: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON-able {class, vocab_size, sha256} that manifests keep, and added_tokens where there are some."""
    identity = {"class": class_name(tokenizer), "vocab_size": int(tokenizer.vocab_size), "sha256": digest}
    return identity | ({"added_tokens": list(added_tokens)} if added_tokens else {})


def utf8(text: str) -> bytes:
    """UTF-8 of a text. Raises TokenizationError where it holds half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        position = len(text[: error.start].encode("utf-8"))
        raise TokenizationError(
            f"byte {position}: {text[error.start]!a} is half a surrogate pair, which has no UTF-8. Remove it",
            position,
        ) from error


def write_tokens(idx2token: Mapping[int, bytes], tokens: Sequence[int]) -> None:
    """Write tokens with their ids to stdout, for `printTokens`."""
    shown = []
    for token_id in tokens:
        token = idx2token[int(token_id)]
        try:
            shown.append(f"{token.decode()!r}{token_id}")
        except UnicodeDecodeError:
            shown.append(f"{token!r}{token_id}")
    sys.stdout.write(" ".join(shown) + " \n")
