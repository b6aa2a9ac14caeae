"""Text of tokens that come one by one: each part as soon as nothing that follows can change it."""

from __future__ import annotations

from typing import Any

from rwkv_cluster.tokenizer import decode_for_display

_REPLACEMENT = "\ufffd"  # a character of which bytes are missing is decoded to this
_CHARACTER_BYTES = 4  # of UTF-8, at most, and a token has one at least


class TextStream:
    """What is said so far, up to `stop`. beginning: what is said already. An empty stop never comes."""

    def __init__(self, tokenizer: Any, stop: str = "", beginning: str = "") -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._said = beginning
        self._tail: list[int] = []  # the last ids, as many as are needed to decode the next one beside
        self._n_decoded = 0  # of the tail
        self._n_taken = 0  # characters of the text that `take` has given
        self.is_over = False

    @property
    def text(self) -> str:
        """What is said, without blanks at its ends, and without `stop`."""
        return self._said.strip()

    def add(self, token: int) -> None:
        """Take the next id in. One that the tokenizer has not says nothing: a model may have more rows than it."""
        if self.is_over or token >= self._tokenizer.vocab_size:
            return
        self._tail.append(token)
        decoded = decode_for_display(self._tokenizer, self._tail)
        if decoded.endswith(_REPLACEMENT) and len(self._tail) - self._n_decoded < _CHARACTER_BYTES:
            return
        # Numbers are decoded with a space between, so the text of an id is what it adds to that of the id before.
        known = decode_for_display(self._tokenizer, self._tail[: self._n_decoded])
        searched = max(len(self._said) - len(self._stop) + 1, 0)
        self._said += decoded[len(known) :]
        self._tail, self._n_decoded = self._tail[self._n_decoded :], len(self._tail) - self._n_decoded
        place = self._said.find(self._stop, searched) if self._stop else -1
        if place >= 0:
            self._said, self.is_over = self._said[:place], True

    def take(self, *, everything: bool = False) -> str:
        """What is new of the text. Without `everything` blanks at its end and what may become `stop` are held back."""
        held = 0 if everything or self.is_over else self._n_held()
        text = self._said[: len(self._said) - held].strip()
        new, self._n_taken = text[self._n_taken :], max(self._n_taken, len(text))
        return new

    def _n_held(self) -> int:
        lengths = range(min(len(self._stop) - 1, len(self._said)), 0, -1)
        return next((length for length in lengths if self._said.endswith(self._stop[:length])), 0)
