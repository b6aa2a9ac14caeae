"""The vocabulary of a run: its model's as configured or as the tokenizer has it; its tokenizer as it was prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config, TokenizerConfig
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.errors import ConfigError, DataError
from rwkv_cluster.tokenizer import GenericTokenizer, build_tokenizer, tokenizer_identity


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """`config` with model.vocab_size filled in from the tokenizer. Raises ConfigError when it is too small."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {wanted}, but the tokenizer has ids up to {vocab_size - 1}. "
            f"Use at least {vocab_size}, or leave model.vocab_size out"
        )
    model = config.model.model_copy(update={"vocab_size": wanted or vocab_size})
    return config.model_copy(update={"model": model})


def tokenizer_of_run(config: TokenizerConfig, data: Path) -> Any:
    """The tokenizer of a work directory, whose vocabulary file may have gone: the directory keeps a copy of it.

    The copy is used where the manifest's digest says that it is the vocabulary that the data was prepared with. data:
    the directory's folder of data. Raises ConfigError or DataError as `build_tokenizer`.
    """
    if config.type == "generic":
        try:
            tokenizer = GenericTokenizer(data / "vocab.txt")
            if tokenizer_identity(tokenizer) == load_manifest(data).tokenizer:
                return tokenizer
        except DataError:  # then the configuration's own is asked for, and says what is wrong
            pass
    return build_tokenizer(config)
