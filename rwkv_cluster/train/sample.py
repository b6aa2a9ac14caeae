"""Text from a trained model: what a run shows at its end, and the `generate` verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rwkv_cluster.config import LoggingConfig, TokenizerConfig
from rwkv_cluster.configfile import load_config
from rwkv_cluster.errors import ConfigError, DataError, MissingCheckpointError
from rwkv_cluster.model.generate import generate
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.tokenizer import build_tokenizer, decode_for_display, encode_to_array
from rwkv_cluster.train.weights import load_model

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_P = 0.9


def require_sample_prompt(logging_config: LoggingConfig, tokenizer: Any) -> None:
    """Refuse a prompt that cannot be encoded before the training rather than after it. Raises ConfigError."""
    prompt = logging_config.sample_prompt
    if not (prompt and logging_config.sample_tokens):
        return
    try:
        encode_to_array(tokenizer, prompt)
    except DataError as error:
        raise ConfigError(f"logging.sample_prompt {prompt!r} cannot be encoded: {error}") from error


def sample_text(model: RWKV, tokenizer: Any, logging_config: LoggingConfig) -> str | None:
    """`sample_tokens` tokens that continue `sample_prompt`, with the prompt; None when no sample is wanted.

    Without a prompt the model starts a new document.
    """
    if logging_config.sample_tokens == 0:
        return None
    return continue_text(
        model,
        tokenizer,
        logging_config.sample_prompt or "",
        n_tokens=logging_config.sample_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        seed=0,
    )


def continue_text(
    model: RWKV, tokenizer: Any, prompt: str, *, n_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """`prompt` and what the model makes of it. Raises DataError for a prompt that the tokenizer cannot encode."""
    prompt_ids = list(tokenizer.encode(prompt)) if prompt else []
    ids = generate(model, prompt_ids, n_tokens, temperature=temperature, top_p=top_p, seed=seed)
    # Decoded as one, since numbers need the space between; a model may have more rows than the tokenizer has ids.
    return decode_for_display(tokenizer, [*prompt_ids, *(token for token in ids if token < tokenizer.vocab_size)])


def generate_text(
    source: Path,
    prompt: str,
    *,
    n_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    tokenizer: TokenizerConfig | None = None,
) -> str:
    """Continue `prompt` with the newest weights of a work directory, or with a .pth file.

    tokenizer: default the work directory's own (of a .pth file: of the work directory that it lies in).
    Raises ConfigError when neither says which tokenizer the model was trained with.
    """
    chosen = tokenizer or _tokenizer_of(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(source, device=device)
    return continue_text(
        model,
        build_tokenizer(chosen),
        prompt,
        n_tokens=n_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def _tokenizer_of(source: Path) -> TokenizerConfig:
    if not source.exists():
        raise MissingCheckpointError(f"{source} does not exist. Name the work directory of a run, or a weights file")
    root = source if source.is_dir() else source.absolute().parent.parent
    path = root / "configs" / "config.yaml"
    if not path.exists():
        raise ConfigError(
            f"{source} does not say which tokenizer it was trained with: there is no {path}. "
            "Name a work directory, or the tokenizer with --tokenizer and --vocab-file"
        )
    return load_config(path).data.tokenizer
