"""The name that a person probably meant by one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that is most like `name`; None where none is. cutoff: likeness from 0 to 1, at least."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def suggestion(name: str, known: Iterable[str], label: str) -> str:
    """`Nearest: NAME`, or all of `known` after `label` where none is like `name`."""
    names = list(known)
    near = nearest(name, names)
    return f"Nearest: {near}" if near is not None else f"{label}: {', '.join(names)}"
