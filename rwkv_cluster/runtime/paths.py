"""Paths as people write them: `~`, environment variables, `pathlib` objects."""

from __future__ import annotations

import os
import re
from typing import Any

from rwkv_cluster.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def written_out(path: Any, what: str) -> str:
    """`path` with `~` and environment variables replaced. What exists under the name as it is written is left alone.

    what: the path's name in messages. Raises ConfigError for what is no path, and for a variable or home directory
    that is not known: nobody wants a folder that is named `$SCRATCH`.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise ConfigError(f"{what} is {path!r:.80}, expected a path")
    if "\0" in text or os.path.exists(text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not (found := os.environ.get(name)):
            state = "not set" if found is None else "empty"
            raise ConfigError(
                f"{what} is {text!r:.200}, but the environment variable {name} is {state}", remedy="Set it"
            )
        return found

    expanded = os.path.expanduser(_VARIABLE.sub(value, text))
    if text.startswith("~") and expanded.startswith("~"):
        raise ConfigError(
            f"{what} is {text!r:.200}, but that home directory is not known",
            remedy=f"Write it out, or ./{text:.200} for a name",
        )
    return expanded
