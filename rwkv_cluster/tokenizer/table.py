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
from rwkv_cluster.tokenizer.integer import AngleTokenizer, IntegerTokenizer
from rwkv_cluster.tokenizer.tokenizers import ByteTokenizer, GenericTokenizer, require_tokenizer, user_tokenizer
from rwkv_cluster.tokenizer.world import WORLD_ROWS, world_file, world_tokenizer


@dataclass(frozen=True)
class BuiltIn:
    """One `data.tokenizer.type`.

    tokenizer_class: of what `build` makes. build: (configuration, its file or None) -> tokenizer. describe: fields of
    the configuration that makes it again; None where the tokenizer is of another type of the same class.
    """

    tokenizer_class: type
    build: Callable[[TokenizerConfig, Path | None], Any]
    describe: Callable[[Any], dict[str, Any] | None]


def _generic(config: TokenizerConfig, vocab_file: Path | None) -> GenericTokenizer:
    if vocab_file is None:
        raise ConfigError("tokenizer type is 'generic' but vocab_file is not set", remedy="Name a vocabulary file")
    return GenericTokenizer(vocab_file)


def _absolute(vocab_file: str | Path) -> str:
    return str(Path(vocab_file).expanduser().absolute())


def _world_fields(tokenizer: GenericTokenizer) -> dict[str, Any] | None:
    if tokenizer.n_rows != WORLD_ROWS:
        return None
    return {} if tokenizer.vocab_file == world_file() else {"vocab_file": _absolute(tokenizer.vocab_file)}


BUILT_IN = {
    "byte": BuiltIn(ByteTokenizer, lambda config, file: ByteTokenizer(), lambda tokenizer: {}),
    "integer": BuiltIn(
        IntegerTokenizer,
        lambda config, file: IntegerTokenizer(config.max_value, file),
        lambda tokenizer: {"max_value": tokenizer.max_value},
    ),
    "angle": BuiltIn(AngleTokenizer, lambda config, file: AngleTokenizer(file), lambda tokenizer: {}),
    "world": BuiltIn(GenericTokenizer, lambda config, file: world_tokenizer(file), _world_fields),
    "generic": BuiltIn(GenericTokenizer, _generic, lambda tokenizer: {"vocab_file": _absolute(tokenizer.vocab_file)}),
}


def is_built_in(tokenizer: Any) -> bool:
    """Whether a tokenizer's ids need no check: its class is one of the built-in ones, and not derived from one."""
    return any(type(tokenizer) is kind.tokenizer_class for kind in BUILT_IN.values())


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
