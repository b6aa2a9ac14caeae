"""Recipes in the package: YAML files of `rwkv_cluster.configs` and its folders, called by their path below it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PARTS = ("machines", "sizes", "tasks")
"""Folders of what recipes include, which is no run by itself."""


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, sorted: those of its folders as `folder/name.yaml`."""
    folder = resources.files("rwkv_cluster.configs")
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    for inner in folder.iterdir():
        if inner.is_dir():
            names += [f"{inner.name}/{entry.name}" for entry in inner.iterdir() if entry.name.endswith(".yaml")]
    return sorted(names)


def shipped_file(name: str) -> bytes:
    """Content of a recipe, whose `name` is one of shipped_recipes()."""
    return resources.files("rwkv_cluster.configs").joinpath(name).read_bytes()


def recipe_name(path: Path) -> str | None:
    """Name of the recipe that `path` stands for, with or without `configs/`; None where it stands for none."""
    name = path.as_posix().removeprefix("configs/")
    return name if name in shipped_recipes() else None


def recipes_in_words() -> str:
    """The recipes for a sentence: those outside folders, and the folders of the others."""
    alone = [name for name in shipped_recipes() if "/" not in name]
    folders = dict.fromkeys(f"{name.partition('/')[0]}/" for name in shipped_recipes() if "/" in name)
    return f"{', '.join(alone)}, or one in {', '.join(f for f in folders if f[:-1] not in PARTS)}"
