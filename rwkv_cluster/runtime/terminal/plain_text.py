"""Text that may reach a shell, a batch script or a terminal: nothing in it ends a line or hides from the reader."""

from __future__ import annotations

import unicodedata

# Controls, invisible formatting, lone surrogates (undecodable bytes), line and paragraph separators.
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def hidden_character(text: str) -> str | None:
    """Words about the first control, invisible or undecodable character of `text`; None where there is none."""
    for position, character in enumerate(text):
        if unicodedata.category(character) in _HIDDEN_CATEGORIES:
            return f"the character {character!a} at position {position}: {text[:80]!a}"
    return None
