"""A conversation, whatever row it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """What one side says. thinking, calls: of an assistant, what it thinks and which functions it calls.

    calls: {"name": ..., "arguments": {...}} each. is_trained: of an assistant's turn, whether it is an answer to learn.
    """

    role: Role
    text: str
    thinking: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    is_trained: bool = True

    @property
    def is_answer(self) -> bool:
        """Whether it is an answer to learn."""
        return self.role == "assistant" and self.is_trained

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said."""
        return not (self.calls or self.text.strip() or self.thinking.strip())


@dataclass(frozen=True)
class Conversation:
    """Turns in order, at least one. tools: functions that may be called, as the row describes them."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def ends_with_answer(self) -> bool:
        """Whether the end of the document is a part of an answer."""
        return self.turns[-1].is_answer


class Question(NamedTuple):
    """A text after which a model answers, and the text that follows its answer unless the document ends; or none."""

    prompt: str
    stop: str
