"""Chat templates in Jinja, as models of the Hugging Face Hub bring them, in a sandbox and without a clock.

They get `messages`, `tools`, `add_generation_prompt` and empty `bos_token` and `eos_token`: documents end with id 0.

What is trained on is what stands in `{% generation %}` blocks. Where a template has none, an answer is what a rendering
with it has more than the rendering of the prompt before it, which must be the beginning of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkv_cluster.data.conversations.turns import Conversation, Question, Turn
from rwkv_cluster.data.inputs.bad_lines import BadLine
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.workdir import sha256_file

_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text has them
_SOME_QUESTION = Turn("user", "q")
_USE_BLOCKS = "Put {% generation %} and {% endgeneration %} around answers in the template"


class JinjaTemplate:
    """The template of a file. Raises ConfigError where it is no Jinja."""

    def __init__(self, path: Path) -> None:
        self.identity = f"jinja:{sha256_file(path)}"
        self.thinking: Mapping[str, str] = {}
        self._path = path
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            source = path.read_text("utf-8")
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{path}:{error.lineno}: {error.message}", remedy="Correct the template") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template {path} cannot be read: {error}", remedy="Correct the file") from error
        self._has_blocks = any(
            isinstance(call.call.node, nodes.ExtensionAttribute) for call in parsed.find_all(nodes.CallBlock)
        )

    def pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """Texts that are encoded one by one, each with whether it is trained on."""
        if any(mark in turn.text for turn in conversation.turns for mark in (_BEGIN, _END)):
            raise BadLine("has U+FDD0 or U+FDD1, which are no characters")
        pieces = self._from_blocks(conversation) if self._has_blocks else self._from_prefixes(conversation)
        return [(text, trained) for text, trained in pieces if text]

    def ask(self, question: str, *, system: str = "", goes_on: bool = False) -> Question:
        """The text of a user's question, as in training. goes_on: behind an answer, as `answered` gives it.

        Raises BadLine.
        """
        asked = [*([Turn("system", system)] if system else []), Turn("user", question)]
        _, end, after = self._around_answer()
        stop = (end + after).strip()
        if not goes_on:
            return Question(self._render(asked, (), answer_follows=True), stop)
        earlier = [_SOME_QUESTION, Turn("assistant", _BEGIN)]
        following = self._render([*earlier, *asked], (), answer_follows=True).rpartition(_BEGIN)[2]
        if self._has_blocks:
            return Question(following.partition(_END)[2], stop)
        if not following.startswith(end):
            raise BadLine(
                f"cannot follow an answer: {self._path} renders what is before it otherwise when it goes on",
                _USE_BLOCKS,
            )
        return Question(following.removeprefix(end), stop)

    def answered(self, answer: str) -> str:
        """The text of an answer after which the conversation goes on, as in training. Raises BadLine."""
        before, end, _ = self._around_answer()
        return f"{before}{answer.strip()}{end}"

    def _around_answer(self) -> tuple[str, str, str]:
        """What is encoded with an answer, before and after it, and what else follows the last one."""
        head, _, after = self._render([_SOME_QUESTION, Turn("assistant", _BEGIN)], ()).rpartition(_BEGIN)
        if self._has_blocks:
            end, _, after = after.partition(_END)
            return head.rpartition(_BEGIN)[2], end, after
        prompt = self._render([_SOME_QUESTION], (), answer_follows=True)
        return head.removeprefix(prompt) if head.startswith(prompt) else "", after, ""

    def _from_blocks(self, conversation: Conversation) -> list[tuple[str, bool]]:
        before, *marked = self._render(conversation.turns, conversation.tools).split(_BEGIN)
        answers = [turn for turn in conversation.turns if turn.role == "assistant"]
        if len(marked) != len(answers) and not all(turn.is_trained for turn in answers):
            raise BadLine(f"has {len(answers)} answers, and its template marks {len(marked)} places")
        pieces = [(before, False)]
        for number, part in enumerate(marked):
            answer, _, after = part.partition(_END)
            is_trained = number >= len(answers) or answers[number].is_trained
            pieces += [(answer, is_trained), (after, False)]
        return pieces

    def _from_prefixes(self, conversation: Conversation) -> list[tuple[str, bool]]:
        turns, tools = conversation.turns, conversation.tools
        whole = self._render(turns, tools)
        pieces: list[tuple[str, bool]] = []
        position = 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:number], tools, answer_follows=True)
            answered = self._render(turns[: number + 1], tools)
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise BadLine(
                    f"cannot be told which part of its text turn {number + 1} is: {self._path} renders what is before "
                    "it otherwise when it goes on",
                    _USE_BLOCKS,
                )
            pieces += [(whole[position : len(prompt)], False), (whole[len(prompt) : len(answered)], turn.is_trained)]
            position = len(answered)
        return [*pieces, (whole[position:], False)]

    def _render(
        self, turns: tuple[Turn, ...] | list[Turn], tools: tuple[dict[str, Any], ...], *, answer_follows: bool = False
    ) -> str:
        try:
            return self._template.render(
                messages=[_message(turn) for turn in turns],
                tools=list(tools) or None,
                add_generation_prompt=answer_follows,
                bos_token="",
                eos_token="",
            )
        except Exception as error:  # whatever an expression of the template raises
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise BadLine(f"{self._path} cannot render it: {reason}", "Correct the line or the template") from None


class _Generation(Extension):  # Jinja knows tags by this class alone
    """The tag `{% generation %}`, which marks what it encloses."""

    tags = {"generation"}  # noqa: RUF012 -- declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `_marked`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in turn.calls]
    return message


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
