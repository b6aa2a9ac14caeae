"""`include` of a configuration file: other files whose fields it begins with.

Included files include nothing themselves. Every node keeps the file and the line in which it stands.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rwkv_cluster.config.shipped import recipe_name, shipped_file, shipped_recipes
from rwkv_cluster.config.yaml_reader import MAX_BYTES, Node, parse_yaml, shown
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.terminal.nearest import nearest

INCLUDE = "include"


def read_file(path: Path) -> bytes:
    """Content of a configuration file, or the beginning of one that is too large. Raises ConfigError."""
    where = shown(str(path), 4096)
    try:
        with open(path, "rb") as handle:
            return handle.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: there is no such file", remedy="Name a YAML file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{where}: this is a folder", remedy="Name a YAML file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: the file cannot be read: {getattr(error, 'strerror', None) or error}") from error


def with_included(root: Node, folders: Sequence[Path] | None) -> Node:
    """`root` without `include`, on top of the fields of the files that it names, of which a later one wins.

    folders: to which the names are relative; what is in none of them is a shipped recipe. None: the text may include
    nothing. Raises ConfigError.
    """
    assert isinstance(root.value, dict)
    fields = dict(root.value)
    node = fields.pop(INCLUDE, None)
    if node is None:
        return root
    if folders is None:
        raise ConfigError(f"{node.origin}: include is for a file that you name, and not read here")
    base: Node | None = None
    for name in _names(node):
        included = _included(name, folders, node.origin)
        base = included if base is None else _on_top(base, included)
    own = Node(fields, "", root.origin)
    return own if base is None else _on_top(base, own)


def _names(node: Node) -> list[str]:
    items = node.value if isinstance(node.value, list) else [node]
    for item in items:
        if not isinstance(item.value, str) or not item.value:
            raise ConfigError(
                f"{item.origin}: include is no path of a file", remedy="Write one, or a list such as [a.yaml, b.yaml]"
            )
    return [item.text for item in items]


def _included(name: str, folders: Sequence[Path], origin: str) -> Node:
    """Fields of the file `name`. origin: where it is named."""
    path = next((folder / name for folder in folders if os.path.exists(folder / name)), None)
    recipe = recipe_name(Path(name))
    if path is not None:
        root = parse_yaml(read_file(path), shown(str(path), 4096))
    elif recipe is not None:
        root = parse_yaml(shipped_file(recipe), recipe)
    else:
        near = nearest(name, shipped_recipes(), 0.5)
        remedy = f"Nearest recipe: {near}" if near else "Name it by its path from the file that includes it"
        raise ConfigError(f"{origin}: include names {shown(name)}, which is neither a file nor a recipe", remedy=remedy)
    if root.value is None:
        return Node({}, "", root.origin)
    if not isinstance(root.value, dict):
        raise ConfigError(f"{root.origin}: expected `name: value` lines")
    if INCLUDE in root.value:
        where = root.value[INCLUDE].origin
        raise ConfigError(
            f"{where}: an included file includes another", remedy=f"Name all of them in {origin.rpartition(':')[0]}"
        )
    return root


def _on_top(base: Node, own: Node) -> Node:
    """`base` with the values of `own` in place of its own. A section whose lines are commented out changes nothing."""
    if not isinstance(base.value, dict):
        return own
    if not isinstance(own.value, dict):
        return base if own.value is None else own
    fields = dict(base.value)
    for name, child in own.value.items():
        fields[name] = _on_top(fields[name], child) if name in fields else child
    return Node(fields, "", own.origin)
