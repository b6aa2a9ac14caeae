"""Parameters by patterns of their names. Torch-free.

A pattern is a shell's: `*` stands for any text, also with dots in it. It fits whole names.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.terminal.nearest import nearest


def fitting(names: Iterable[str], patterns: Iterable[str], field: str) -> list[str]:
    """Those of `names` that a pattern fits, in their order.

    field: of the configuration, where the patterns stand. Raises ConfigError for one that fits none.
    """
    names, chosen = list(names), set[str]()
    for pattern in patterns:
        fits = {name for name in names if fnmatchcase(name, pattern)}
        if not fits:
            near = nearest(pattern, names, 0) or names[-1]
            raise ConfigError(
                f"{field} has {pattern!r}, which fits none of {len(names)} names",
                remedy=f"One of them is {near}; * stands for any text",
            )
        chosen |= fits
    return [name for name in names if name in chosen]
