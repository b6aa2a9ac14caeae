"""Text from a model: what a run shows meanwhile and at its end, and the `generate` verb."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_cluster.adapters.read_folder import merge_folder
from rwkv_cluster.config import DataConfig, LoggingConfig, TokenizerConfig
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.config.recipes import require_built_in, tokenizer_options
from rwkv_cluster.data.conversations.turns import Question
from rwkv_cluster.data.run_tokenizer import tokenizer_of_run
from rwkv_cluster.errors import ConfigError, DataError, MissingCheckpointError
from rwkv_cluster.interchange.read import is_work_dir, peek_weights
from rwkv_cluster.interchange.state_file import load_state
from rwkv_cluster.interchange.tokenizer_file import tokenizer_beside
from rwkv_cluster.model.generate import END_OF_DOCUMENT, PROMPT_CHUNK, generate_together, stream
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.own_file import require_own
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.runtime.terminal.time_left import Countdown
from rwkv_cluster.tokenizer import (
    WORLD_ROWS,
    build_tokenizer,
    decode_for_display,
    encode_to_array,
    world_file,
    world_tokenizer,
)
from rwkv_cluster.tokenizer.world import FILE_NAME
from rwkv_cluster.train.checkpoint.weights import model_from_weights, weights_of
from rwkv_cluster.train.memory.inference import inference_dtype
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.workdir import CONFIG_YAML, WorkDir, atomic_write

log = logging.getLogger("rwkv_cluster")
_NAME_IT = "Name a work directory, or the tokenizer with --tokenizer and --vocab-file"

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
    tokens = stream(model, prompt_ids, temperature=temperature, top_p=top_p, seed=seed)
    return _text(tokenizer, [*prompt_ids, *_taken(tokens, n_tokens)])


def answer(
    model: RWKV, tokenizer: Any, question: Question, *, n_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """What the model answers, without the prompt and what follows the answer. Raises DataError as `continue_text`."""
    tokens = stream(model, list(tokenizer.encode(question.prompt)), temperature=temperature, top_p=top_p, seed=seed)
    stop, last = question.stop, len(question.stop)  # a token has a byte at least

    def is_over(ids: list[int]) -> bool:
        return bool(stop) and stop in _text(tokenizer, ids[-last:])

    return _text(tokenizer, _taken(tokens, n_tokens, is_over)).partition(stop or "\0")[0].strip()


def _taken(tokens: Iterator[int], n_tokens: int, is_over: Callable[[list[int]], bool] = lambda ids: False) -> list[int]:
    """The next tokens, `n_tokens` at most, up to the end of the document or until `is_over` of them."""
    ids: list[int] = []
    with Countdown("generating", n_tokens, "tokens") as left:
        for token in islice(tokens, n_tokens):
            if token == END_OF_DOCUMENT:
                break
            ids.append(token)
            left.advance(1)
            if is_over(ids):
                break
    return ids


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Decoded as one, since numbers need the space between; a model may have more rows than the tokenizer has ids."""
    return decode_for_display(tokenizer, [token for token in ids if token < tokenizer.vocab_size])


class Sampler:
    """Texts of a model in training, every `sample_interval_steps`, in files of `folder`. Every rank has one."""

    def __init__(self, tokenizer: Any, logging_config: LoggingConfig, folder: Path, events: Events) -> None:
        self._tokenizer = tokenizer
        self._config = logging_config
        self._folder = folder
        self._events = events

    def is_due(self, step: int) -> bool:
        """Whether it is time after so many steps."""
        interval = self._config.sample_interval_steps
        return interval is not None and step % interval == 0 and self._config.sample_tokens > 0

    def sample(self, model: RWKV, step: int, check: Callable[[], None]) -> None:
        """Continue `sample_prompt`. Collective; all draws are of generators of its own. check: see `generate_together`.

        Raises CheckpointError when the disk refuses the text.
        """
        prompt = self._config.sample_prompt
        prompt_ids = list(self._tokenizer.encode(prompt)) if prompt else []
        options = {"temperature": SAMPLE_TEMPERATURE, "top_p": SAMPLE_TOP_P, "seed": 0}
        ids = generate_together(model, prompt_ids, self._config.sample_tokens, check=check, **options)
        if rank() == 0:
            self._write(_text(self._tokenizer, [*prompt_ids, *ids]), step)

    def _write(self, text: str, step: int) -> None:
        path, content = self._folder / f"step-{step:08d}.txt", text.encode(errors="backslashreplace")
        with writing(path, len(content)):
            self._folder.mkdir(exist_ok=True)
            atomic_write(path, content)
        self._events.add("sample", step, path=path)
        log.info("sample of step %d: %s", step, text)


def generate_text(
    source: Path,
    prompt: str | Question,
    *,
    tokenizer: TokenizerConfig | None = None,
    adapter: Path | None = None,
    state: Path | None = None,
    **options: Any,
) -> str:
    """Continue `prompt`, or answer it, with the model that `load_generator` loads. options: of `continue_text`.

    Raises as `load_generator`, and DataError for a prompt that the tokenizer cannot encode.
    """
    model, chosen = load_generator(source, tokenizer, adapter=adapter, state=state)
    if isinstance(prompt, Question):
        return answer(model, chosen, prompt, **options)
    return continue_text(model, chosen, prompt, **options)


class Generator(NamedTuple):
    """A model and the tokenizer that it was trained with."""

    model: RWKV
    tokenizer: Any


def load_generator(
    source: Path, tokenizer: TokenizerConfig | None = None, *, adapter: Path | None = None, state: Path | None = None
) -> Generator:
    """The newest weights of a work directory, or those of a file or folder, with their tokenizer.

    The model is in fp32, on a GPU without the memory for that in 16 bits.

    tokenizer: default the work directory's own (of a file: of the work directory that it lies in), or the World
    vocabulary that lies beside the weights, or an installed one for a model with its number of rows. adapter: folder of
    one that is added to the weights. state: file of a state that the model begins from. Raises ConfigError where
    nothing says which tokenizer the model was trained with, or it has more ids than the model has rows.
    """
    chosen = build_tokenizer(tokenizer) if tokenizer else _tokenizer_of(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = weights_of(source)
    dtype = inference_dtype(weights, device, tokens=PROMPT_CHUNK)
    model = model_from_weights(source, weights, device=device, dtype=dtype)
    if chosen is None:
        chosen = _tokenizer_by_rows(source, model)
    n_ids, n_rows = int(chosen.vocab_size), model.config.vocab_size or 0
    if n_ids > n_rows:
        raise ConfigError(
            f"{source} has {n_rows:,} vocabulary rows, fewer than the tokenizer has ids ({n_ids:,})",
            remedy="Name the tokenizer that it was trained with by --tokenizer and --vocab-file",
        )
    if adapter is not None:
        merge_folder(model, adapter, base=weights)
    if state is not None:
        load_state(model, state)
    return Generator(model, chosen)


def template_of(source: Path) -> str:
    """`data.template` of the work directory that `source` is or lies in; g1 where it is none."""
    path = _root_of(source) / CONFIG_YAML
    return load_config(path).data.template if path.exists() else DataConfig.model_fields["template"].default


def _tokenizer_of(source: Path) -> Any:
    """The tokenizer of the work directory that `source` is or lies in, or that lies beside it; None for neither."""
    if not source.exists():
        raise MissingCheckpointError(
            f"{source} does not exist", remedy="Name the work directory of a run, or a weights file"
        )
    root = _root_of(source)
    path = root / CONFIG_YAML
    if not path.exists():
        if is_work_dir(source):
            raise _unknown_tokenizer(source, _NAME_IT)
        peek_weights(source)  # what is no weights is called by its name, and not asked for a tokenizer
        return tokenizer_beside(_vocabulary_beside(source).parent)
    require_own(path)
    tokenizer = load_config(path).data.tokenizer
    require_built_in(tokenizer, path, shlex.join(tokenizer_options(tokenizer)))
    return tokenizer_of_run(tokenizer, WorkDir(root).data)


def _tokenizer_by_rows(source: Path, model: RWKV) -> Any:
    """The World tokenizer for a model with as many rows as the released ones. Raises ConfigError for any other."""
    if model.config.vocab_size != WORLD_ROWS:
        raise _unknown_tokenizer(source, _NAME_IT)
    if world_file() is None:
        rows = f"Its {WORLD_ROWS:,} rows are as many as World models have"
        raise _unknown_tokenizer(
            source, f"{rows}, whose vocabulary `pip install 'rwkv-cluster[world]'` brings, and --vocab-file names"
        )
    log.info("%s has %s rows: taking the World tokenizer; --tokenizer names another", source, f"{WORLD_ROWS:,}")
    return world_tokenizer(None)


def _root_of(source: Path) -> Path:
    return source if source.is_dir() else source.absolute().parent.parent


def _vocabulary_beside(source: Path) -> Path:
    return (source if source.is_dir() else source.absolute().parent) / FILE_NAME


def _unknown_tokenizer(source: Path, remedy: str) -> ConfigError:
    absent = f"neither {_root_of(source) / CONFIG_YAML} nor {_vocabulary_beside(source)}"
    return ConfigError(
        f"{source} does not say which tokenizer it was trained with: there is {absent}",
        remedy=remedy,
    )
