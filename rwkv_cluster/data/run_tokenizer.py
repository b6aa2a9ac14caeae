"""The tokenizer that a work directory's data was prepared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_cluster.config import TOKENIZER_TYPES, TokenizerConfig
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.errors import DataError
from rwkv_cluster.tokenizer import build_tokenizer, tokenizer_identity
from rwkv_cluster.tokenizer.table import BUILT_IN


def tokenizer_of_run(config: TokenizerConfig, data: Path) -> Any:
    """The tokenizer of a work directory, whose vocabulary file may have gone: the directory keeps a copy of it.

    The copy is used where the manifest's digest says that it is the vocabulary that the data was prepared with. data:
    the directory's folder of data. Raises ConfigError or DataError as `build_tokenizer`.
    """
    kind = TOKENIZER_TYPES.get(config.type)
    if kind is not None and kind.file:
        try:
            copy = data / BUILT_IN[config.type].saved_as
            tokenizer = build_tokenizer(config.model_copy(update={kind.file: str(copy)}))
            if tokenizer_identity(tokenizer) == load_manifest(data).tokenizer:
                return tokenizer
        except DataError:  # then the configuration's own is asked for, and says what is wrong
            pass
    return build_tokenizer(config)
