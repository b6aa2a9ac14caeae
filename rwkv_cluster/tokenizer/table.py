"""Table of the built-in tokenizers: which class a `data.tokenizer.type` has, made how, and its configuration again.

A further type is a row here and, for what the configuration takes with it, in `rwkv_cluster.config.schema`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.config import TokenizerConfig
from rwkv_cluster.config.schema import TOKENIZER_TYPES
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer.base import class_name
from rwkv_cluster.tokenizer.hub import HubTokenizer
from rwkv_cluster.tokenizer.integer import AngleTokenizer, IntegerTokenizer
from rwkv_cluster.tokenizer.tokenizers import ByteTokenizer, GenericTokenizer, require_tokenizer, user_tokenizer
from rwkv_cluster.tokenizer.world import WORLD_ROWS, world_file, world_tokenizer
from rwkv_cluster.workdir import HUB_TOKENIZER, VOCABULARY


@dataclass(frozen=True)
class BuiltIn:
    """One `data.tokenizer.type`.

    tokenizer_class: of what `build` makes. build: (configuration, its file or None) -> tokenizer. describe: fields of
    the configuration that makes it again; None where the tokenizer is of another type of the same class. saved_as: name
    of the copy of its file in a folder of data.
    """

    tokenizer_class: type
    build: Callable[[TokenizerConfig, Path | None], Any]
    describe: Callable[[Any], dict[str, Any] | None]
    saved_as: str = VOCABULARY


def _generic(config: TokenizerConfig, vocab_file: Path | None) -> GenericTokenizer:
    if vocab_file is None:
        raise ConfigError("tokenizer type is 'generic' but vocab_file is not set", remedy="Name a vocabulary file")
    return GenericTokenizer(vocab_file, config.added_tokens or ())


def _hub(config: TokenizerConfig, path: Path | None) -> HubTokenizer:
    if path is None:
        raise ConfigError("tokenizer type is 'hf' but path is not set", remedy="Name a tokenizer.json")
    return HubTokenizer(path, config.added_tokens or ())


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())


def _added(tokenizer: GenericTokenizer | HubTokenizer) -> dict[str, Any]:
    return {"added_tokens": list(tokenizer.added_tokens)} if tokenizer.added_tokens else {}


def _generic_fields(tokenizer: GenericTokenizer) -> dict[str, Any]:
    return {"vocab_file": _absolute(tokenizer.vocab_file), **_added(tokenizer)}


def _world_fields(tokenizer: GenericTokenizer) -> dict[str, Any] | None:
    if tokenizer.n_rows != WORLD_ROWS:
        return None
    return _added(tokenizer) if tokenizer.vocab_file == world_file() else _generic_fields(tokenizer)


BUILT_IN = {
    "byte": BuiltIn(ByteTokenizer, lambda config, file: ByteTokenizer(), lambda tokenizer: {}),
    "integer": BuiltIn(
        IntegerTokenizer,
        lambda config, file: IntegerTokenizer(config.max_value, file),
        lambda tokenizer: {"max_value": tokenizer.max_value},
    ),
    "angle": BuiltIn(AngleTokenizer, lambda config, file: AngleTokenizer(file), lambda tokenizer: {}),
    "world": BuiltIn(
        GenericTokenizer, lambda config, file: world_tokenizer(file, config.added_tokens or ()), _world_fields
    ),
    "generic": BuiltIn(GenericTokenizer, _generic, _generic_fields),
    "hf": BuiltIn(
        HubTokenizer,
        _hub,
        lambda tokenizer: {"path": _absolute(tokenizer.path), **_added(tokenizer)},
        saved_as=HUB_TOKENIZER,
    ),
}


def is_built_in(tokenizer: Any) -> bool:
    """Whether a tokenizer's ids need no check: its class is one of the built-in ones, and not derived from one."""
    return any(type(tokenizer) is kind.tokenizer_class for kind in BUILT_IN.values())


def saved_name(tokenizer: Any) -> str:
    """Name of the copy of a tokenizer's file in a folder of data."""
    kinds = (kind for kind in BUILT_IN.values() if type(tokenizer) is kind.tokenizer_class)
    return next((kind.saved_as for kind in kinds), VOCABULARY)


def build_tokenizer(config: TokenizerConfig) -> Any:
    """The tokenizer that `config` describes.

    A user's `package.module:ClassName` is made with vocab_file as its argument, or with none where that is
    not set. Raises ConfigError for a class that cannot be had, MissingDataError or VocabularyError.
    """
    kind = TOKENIZER_TYPES.get(config.type)
    named = getattr(config, kind.file if kind and kind.file else "vocab_file")
    file = None if named is None else Path(named).expanduser()
    return BUILT_IN[config.type].build(config, file) if kind else user_tokenizer(config.type, file)


def as_tokenizer(given: Any) -> Any:
    """The tokenizer that a Python caller means: an object, a type of data.tokenizer such as 'byte', or its section.

    Raises ConfigError for anything else, and as `build_tokenizer`.
    """
    if isinstance(given, str):
        return build_tokenizer(TokenizerConfig(type=given))
    if isinstance(given, TokenizerConfig):
        return build_tokenizer(given)
    return require_tokenizer(given, given.__qualname__ if isinstance(given, type) else type(given).__qualname__)


def describe_tokenizer(tokenizer: Any) -> TokenizerConfig:
    """The configuration from which `build_tokenizer` makes this tokenizer again, where it can."""
    for name, kind in BUILT_IN.items():
        if type(tokenizer) is kind.tokenizer_class and (fields := kind.describe(tokenizer)) is not None:
            return TokenizerConfig(type=name, **fields)
    return TokenizerConfig(type=class_name(tokenizer))
