"""What a CONFIG argument stands for: a YAML file, a work directory, or a recipe shipped with the package."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from rwkv_cluster.config.include import read_file
from rwkv_cluster.config.loader import ResolvedConfig, parse_config, resolve_config, yaml_text
from rwkv_cluster.config.schema import TOKENIZER_TYPES, TokenizerConfig
from rwkv_cluster.config.shipped import recipe_name, recipes_in_words, shipped_file, shipped_recipes
from rwkv_cluster.config.yaml_reader import shown
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.own_file import require_own
from rwkv_cluster.runtime.terminal.nearest import nearest
from rwkv_cluster.workdir import CONFIG_YAML

# Fields of `launch` that say which programs run, with what in their environment, and with which machines they speak.
_DECIDE_WHAT_RUNS = (
    "setup", "env", "python", "sweep", "slurm_parameters", "hosts", "hostfile", "rdzv_endpoint", "container.image",
    "container.mounts", "container.extra_args", "kubernetes.context", "kubernetes.namespace", "kubernetes.volumes",
    "kubernetes.secrets", "kubernetes.pull_secrets", "kubernetes.run_as", "kubernetes.queue",
)  # fmt: skip

_OF_DATA = {".jsonl", ".ndjson", ".npy", ".bin", ".idx", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".zip", ".tar"}


@dataclass(frozen=True)
class FoundConfig:
    """A resolved configuration; `notice` tells when it is not the file that was named, else empty.

    stored: the file of a work directory that it was read from, which somebody else may have written; None: the user
    named the file itself.
    """

    resolved: ResolvedConfig
    notice: str = ""
    stored: Path | None = None

    def require_own_tokenizer(self) -> None:
        """Raises ConfigError where only a stored file names the tokenizer's class, whose module would be imported."""
        if self.stored is not None and self._is_stored("data.tokenizer.type"):
            tokenizer = self.resolved.config.data.tokenizer
            require_built_in(tokenizer, self.stored, f"--data.tokenizer.type={tokenizer.type}")

    def require_own_launch(self) -> None:
        """Raises ConfigError where only a stored file says what a launch runs: a program, shell lines, an image."""
        if self.stored is None:
            return
        fields = [f"launch.{name}" for name in _DECIDE_WHAT_RUNS if self._is_stored(f"launch.{name}")]
        if fields:
            command = ("rwkv-cluster", "launch", str(self.stored), f"--work_dir={self.resolved.config.work_dir}")
            raise ConfigError(
                f"{self.stored} sets {', '.join(fields)}, which decides what runs, and a work directory may be "
                "somebody else's",
                remedy=f"Read that file; if you trust it, name it: `{shlex.join(command)}`",
            )

    def _is_stored(self, field: str) -> bool:
        """Whether the stored file, and not the command line, gives a field a value."""
        value = reduce(getattr, field.split("."), self.resolved.config)
        return bool(value) and self.resolved.sources[field].startswith(f"{shown(str(self.stored), 4096)}:")


def require_built_in(tokenizer: TokenizerConfig, stored: Path, remedy: str) -> None:
    """Refuse a tokenizer's class that a file of a work directory names, before its module is imported.

    remedy: how its user names the class. Raises ConfigError.
    """
    if tokenizer.type not in TOKENIZER_TYPES:
        raise ConfigError(
            f"{stored} names the tokenizer {tokenizer.type}, whose module would be imported, and a work directory may "
            "be somebody else's",
            remedy=f"If you trust that module, name it yourself: {remedy}",
        )


def tokenizer_options(tokenizer: TokenizerConfig) -> tuple[str, ...]:
    """Options of `generate` that name a user's class; none for a built-in tokenizer, which a stored file may name."""
    if tokenizer.type in TOKENIZER_TYPES:
        return ()
    return ("--tokenizer", tokenizer.type, *(("--vocab-file", tokenizer.vocab_file) if tokenizer.vocab_file else ()))


def find_config(argument: str, overrides: Sequence[str] = ()) -> FoundConfig:
    """Configuration that the command-line `argument` names, with `section.field=value` overrides.

    A folder is a work directory: its configs/config.yaml is read and `work_dir` is that folder, wherever it
    was moved to. `NAME.yaml` or `configs/NAME.yaml` falls back to the shipped recipe of that name.
    Raises ConfigError.
    """
    path = Path(argument)
    if path.is_dir():
        stored = path / CONFIG_YAML
        return FoundConfig(_work_dir_config(path, stored, overrides), stored=stored)
    if path.suffix.lower() in _OF_DATA and path.exists():
        raise ConfigError(
            f"{argument} is data, and not the YAML file of a run",
            remedy="Name such a file, or a shipped recipe "
            f"({recipes_in_words()}), and the data by data.inputs: --data.inputs=[{yaml_text(argument)}]",
        )
    if path.exists():
        return FoundConfig(resolve_config(path, overrides))
    recipe = recipe_name(path)
    if recipe is not None:
        notice = f"{argument} does not exist here: using the recipe {recipe} shipped with rwkv-cluster"
        return FoundConfig(parse_config(shipped_file(recipe), recipe, overrides, include_from=[]), notice)
    near = nearest(argument, shipped_recipes(), 0.5)
    hint = f" Nearest: {near}." if near else ""
    raise ConfigError(
        f"{argument}: there is no such file.{hint} Name a YAML file, the work directory of a run, "
        f"or a shipped recipe: {recipes_in_words()}"
    )


def _work_dir_config(folder: Path, path: Path, overrides: Sequence[str]) -> ResolvedConfig:
    if not path.exists():
        raise ConfigError(
            f"{folder}: this folder holds no configs/config.yaml, so it is not the work directory of a run",
            remedy="Name a YAML file, or a folder in which a run has started",
        )
    require_own(path)
    # As YAML text, because a folder's name may look like a list or a number.
    overrides = [f"work_dir={yaml_text(str(folder))}", *overrides]
    return parse_config(read_file(path), shown(str(path), 4096), overrides)  # it is whole: nothing is included
