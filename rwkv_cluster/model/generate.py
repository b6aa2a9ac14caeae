"""Text from a trained model, one token at a time in constant memory: the state replaces the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import ConfigError, TrainingError
from rwkv_cluster.model.rwkv import RWKV, State

PROMPT_CHUNK = 512  # prompt tokens per forward pass: bounds the memory, whatever the prompt's length
END_OF_DOCUMENT = 0


def generate(
    model: RWKV,
    prompt_ids: Sequence[int],
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
    stop_token: int | None = END_OF_DOCUMENT,
) -> list[int]:
    """Continuation of `prompt_ids`, without the prompt and without the stop token: at most `n_tokens` ids.

    Args:
        model: on any device, in any dtype.
        prompt_ids: token ids; empty means the start of a document.
        n_tokens: length of the continuation, unless `stop_token` comes first.
        temperature: 0 takes the most probable token each time (the first, in a tie); greater is more random.
        top_p: share of probability, in (0, 1], from which tokens are drawn, the most probable first.
        seed: of the draws; the same seed gives the same tokens.
        stop_token: token that ends the continuation; None: never.

    Raises:
        ConfigError: an argument is out of range.
        TrainingError: the model's logits are not finite.
    """
    tokens = stream(model, prompt_ids, temperature=temperature, top_p=top_p, seed=seed)
    continuation: list[int] = []
    while len(continuation) < n_tokens:
        token = next(tokens)
        if token == stop_token:
            break
        continuation.append(token)
    return continuation


def generate_together(
    model: RWKV, prompt_ids: Sequence[int], n_tokens: int, *, check: Callable[[], None], **options: Any
) -> list[int]:
    """`generate` on all ranks of a run at once, each of which makes as many passes and gets its own result.

    check: called before each token, to end it by an exception, on all ranks the same.

    Under ZeRO-3 a pass needs all ranks, and ranks may differ in the last bits of a logit: one that ended its document
    before the others would leave them waiting.
    """
    tokens = stream(model, prompt_ids, **options)
    continuation: list[int] = []
    while len(continuation) < n_tokens:
        check()
        continuation.append(next(tokens))
    return list(takewhile(lambda token: token != END_OF_DOCUMENT, continuation))


def stream(
    model: RWKV, prompt_ids: Sequence[int], *, temperature: float = 1.0, top_p: float = 0.9, seed: int = 0
) -> Iterator[int]:
    """Endless continuation of `prompt_ids`, token by token. Arguments and errors as `generate`."""
    vocab_size = model.config.vocab_size  # under ZeRO-3 the weights are empty between forward passes
    assert vocab_size is not None
    prompt = list(prompt_ids) or [END_OF_DOCUMENT]
    bad = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise ConfigError(f"prompt has token id {bad}, but the model's vocabulary is 0 to {vocab_size - 1}")
    if not temperature >= 0:
        raise ConfigError(f"temperature is {temperature}", remedy="Use 0 (most probable token) or a positive number")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}", remedy="Use a number above 0 and at most 1")
    return _continue(model, prompt, temperature, top_p, torch.Generator("cpu").manual_seed(seed))


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from fp32 logits [V] on the CPU.

    The rule of the `rwkv` package's sample_logits: top_p selects on the plain probabilities, then the temperature
    reshapes what is left.
    """
    if not logits.isfinite().all():
        raise TrainingError("the model's logits are not finite", remedy="Use an earlier checkpoint or a lower rate")
    if temperature == 0:
        return int(logits.argmax())
    ordered, order = torch.softmax(logits, dim=-1).sort(descending=True, stable=True)  # [V]
    n_tokens = 1 + int((ordered.cumsum(0) < top_p).sum())  # the fewest that reach top_p
    weights = torch.softmax(logits[order[:n_tokens]] / temperature, dim=-1)
    return int(order[torch.multinomial(weights, 1, generator=generator)])


@torch.no_grad()  # inference_mode would mark parameters that ZeRO-3 gathers in here and keeps for the steps after it
def read(
    model: RWKV, ids: Sequence[int], state: State, check: Callable[[], object] = lambda: None
) -> tuple[Tensor, State]:
    """Logits [V], fp32 on the CPU, and the state after `ids`, at least one, which continue from `state`.

    check: called before each PROMPT_CHUNK of them, to end it by an exception. `state` itself stays as it is.
    """
    for start in range(0, len(ids), PROMPT_CHUNK):
        check()
        tokens = torch.tensor([ids[start : start + PROMPT_CHUNK]], device=model.emb.weight.device)  # [1,T]
        logits, state = model.forward_last(tokens, state)  # [1,V]
    return logits[0].float().cpu(), state


def draw(
    model: RWKV, logits: Tensor, state: State, *, temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    """Endless continuation, token by token, of what `read` has read. Raises TrainingError as `generate`."""
    while True:
        token = sample(logits, temperature, top_p, generator)
        yield token
        logits, state = read(model, [token], state)


def _continue(
    model: RWKV, prompt: list[int], temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    logits, state = read(model, prompt, model.initial_state(batch_size=1))
    yield from draw(model, logits, state, temperature=temperature, top_p=top_p, generator=generator)
