"""The vocabulary of a run's model: as configured, or as the tokenizer has it."""

from __future__ import annotations

from rwkv_cluster.config import Config
from rwkv_cluster.errors import ConfigError


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
