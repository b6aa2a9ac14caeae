"""What a CONFIG argument stands for: a YAML file, a work directory, or a recipe shipped with the package."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rwkv_cluster.configfile import ResolvedConfig, parse_config, resolve_config, yaml_text
from rwkv_cluster.errors import ConfigError


@dataclass(frozen=True)
class FoundConfig:
    """A resolved configuration; `notice` tells when it is not the file that was named, else empty."""

    resolved: ResolvedConfig
    notice: str = ""


def shipped_recipes() -> list[str]:
    """File names of the recipes in the package, sorted."""
    folder = resources.files("rwkv_cluster.configs")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_config(argument: str, overrides: Sequence[str] = ()) -> FoundConfig:
    """Configuration that the command-line `argument` names, with `section.field=value` overrides.

    A folder is a work directory: its configs/config.yaml is read and `work_dir` is that folder, wherever it
    was moved to. `NAME.yaml` or `configs/NAME.yaml` falls back to the shipped recipe of that name.
    Raises ConfigError.
    """
    path = Path(argument)
    if path.is_dir():
        return FoundConfig(_work_dir_config(path, overrides))
    if path.exists():
        return FoundConfig(resolve_config(path, overrides))
    recipes = shipped_recipes()
    if path.name in recipes and path.parent in (Path("."), Path("configs")) and not path.is_absolute():
        content = resources.files("rwkv_cluster.configs").joinpath(path.name).read_bytes()
        notice = f"{argument} does not exist here: using the recipe {path.name} shipped with rwkv-cluster"
        return FoundConfig(parse_config(content, path.name, overrides), notice)
    near = difflib.get_close_matches(path.name, recipes, 1, 0.5)
    nearest = f" Nearest: {near[0]}." if near else ""
    raise ConfigError(
        f"{argument}: there is no such file.{nearest} Name a YAML file, the work directory of a run, "
        f"or a shipped recipe: {', '.join(recipes)}"
    )


def _work_dir_config(folder: Path, overrides: Sequence[str]) -> ResolvedConfig:
    path = folder / "configs" / "config.yaml"
    if not path.exists():
        raise ConfigError(
            f"{folder}: this folder holds no configs/config.yaml, so it is not the work directory of a run. "
            "Name a YAML file, or a folder in which a run has started"
        )
    # As YAML text, because a folder's name may look like a list or a number.
    return resolve_config(path, [f"work_dir={yaml_text(str(folder))}", *overrides])
