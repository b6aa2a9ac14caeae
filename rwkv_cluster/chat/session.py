"""A conversation whose history is the model's state: as much memory after a thousand turns as after one.

What a session reads is what training on the whole conversation reads, id for id: a prompt up to where the answer
begins, the answer with what ends it, the next prompt. To that end the state before an answer is kept, and the answer,
once it is known, is read from there: the ids that the model has drawn may be cut otherwise, and go on into a next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rwkv_cluster.chat.text_stream import TextStream
from rwkv_cluster.data.conversations.template import Template
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.generate import END_OF_DOCUMENT, draw, read
from rwkv_cluster.model.own_state import named_state
from rwkv_cluster.model.rwkv import RWKV

Thinking = Literal["on", "off", "auto"]
End = Literal["said", "too long", "stopped", "nothing"]
"""Why an answer ended: it was, it had as many tokens as it may have, it was stopped, or nothing was said."""


@dataclass(frozen=True)
class ChatOptions:
    """How answers are drawn. n_tokens: at most, of an answer. system: what the system says first, "" for nothing."""

    n_tokens: int
    temperature: float
    top_p: float
    seed: int
    system: str = ""


class ChatSession:
    """One conversation. think: whether answers begin with thinking; "auto" leaves it to the model.

    Raises ConfigError where the template knows no beginning of an answer for `think`.
    """

    def __init__(self, model: RWKV, tokenizer: Any, template: Template, options: ChatOptions) -> None:
        self._model, self._tokenizer, self._template, self._options = model, tokenizer, template, options
        self._generator = torch.Generator("cpu").manual_seed(options.seed)
        self._think: Thinking = "auto"
        self.ended: End = "nothing"
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        with torch.no_grad():
            self._state = self._model.initial_state(batch_size=1)
        self._goes_on = False

    def named_state(self) -> dict[str, Tensor]:
        """The state after what was said so far, with the token shifts, as `interchange.state_file` writes it."""
        return named_state(self._model, self._state)

    def set_thinking(self, think: Thinking) -> None:
        """Let answers begin with thinking ("on"), without ("off"), or as the model likes. Raises ConfigError."""
        known = self._template.thinking
        if think != "auto" and think not in known:
            raise ConfigError(
                f"thinking cannot be switched {think}: the template has no beginning of an answer for it",
                remedy="Use --template g1, or leave it to the model",
            )
        self._think = think

    def ask(self, question: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Parts of the answer as they come; the session goes on once there are no more. `ended` says why that is.

        is_stopped: asked before each token; true ends the answer there. Where nothing was said until then, the question
        is forgotten too. Raises DataError or BadLine, without a change, for a question that cannot be encoded.
        """
        template, options = self._template, self._options
        prompt, stop = template.ask(question, system="" if self._goes_on else options.system, goes_on=self._goes_on)
        beginning = template.thinking.get(self._think, "")
        prompt_ids, beginning_ids = self._encode(prompt), self._encode(beginning)
        self.ended = "nothing"
        try:
            logits, before = read(self._model, prompt_ids, self._state, _raising(is_stopped))
            state = before
            if beginning_ids:
                logits, state = read(self._model, beginning_ids, state, _raising(is_stopped))
        except _Stopped:
            return
        text = TextStream(self._tokenizer, stop, beginning)
        tokens = draw(
            self._model,
            logits,
            state,
            temperature=options.temperature,
            top_p=options.top_p,
            generator=self._generator,
        )
        self.ended = "too long"
        for _ in range(options.n_tokens):
            if is_stopped():
                self.ended = "stopped"
                break
            token = next(tokens)
            if token != END_OF_DOCUMENT:
                text.add(token)
            if token == END_OF_DOCUMENT or text.is_over:
                self.ended = "said"
                break
            if part := text.take():
                yield part
        if part := text.take(everything=True):
            yield part
        if not text.text:
            self.ended = "nothing"
            return
        _, self._state = read(self._model, self._encode(template.answered(text.text)), before)
        self._goes_on = True

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)] if text else []


class _Stopped(Exception):
    """The answer is not wanted any more."""


def _raising(is_stopped: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if is_stopped():
            raise _Stopped

    return check
