"""BlinkDL's text of RWKV-7 G1 models, which World models know as well.

    "System: s\\n\\nUser: q\\n\\nAssistant: a\\n\\nUser: q2\\n\\nAssistant: a2", then id 0

From `RWKV-v7/RWKV7-G1x-templates.txt` of BlinkDL/RWKV-LM: what system and user say is cleaned of blank lines; a prompt
ends with "Assistant:" and the answer begins with a blank. Tools are a part of what the system says, a call is a block
of JSON, and its result comes from the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rwkv_cluster.data.conversations.turns import Conversation, Question, Turn

NAME = "g1"
_ANSWER_FOLLOWS = "Assistant:"
_THINKING = {"on": " <think", "off": " <think></think"}  # the model goes on with ">"
_BLANK_LINES = re.compile(r"\n{2,}")


class G1Template:
    """The template `g1` of data.template."""

    identity = NAME
    thinking: Mapping[str, str] = _THINKING

    def pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """Texts that are encoded one by one, each with whether it is trained on: answers, with the blank line that
        ends them."""
        pieces: list[tuple[str, bool]] = []
        prompt = ""
        turns = _with_tools(conversation)
        for number, turn in enumerate(turns, 1):
            end = "\n\n" if number < len(turns) else ""
            if turn.role == "assistant":
                pieces += [(prompt + _ANSWER_FOLLOWS, False), (f" {_answer(turn)}{end}", turn.is_trained)]
                prompt = ""
            elif turn.role == "tool":
                prompt += f"User: Function output:\n{clean(turn.text)}{end}"
            else:
                prompt += f"{turn.role.capitalize()}: {clean(turn.text)}{end}"
        return [*pieces, (prompt, False)] if prompt else pieces

    def ask(self, question: str, *, system: str = "", goes_on: bool = False) -> Question:
        """The text of a user's question, as in training. goes_on: behind an answer, as `answered` gives it."""
        said = f"System: {clean(system)}\n\n" if system else ""
        return Question(f"{said}User: {clean(question)}\n\n{_ANSWER_FOLLOWS}", stop="\n\nUser:")

    def answered(self, answer: str) -> str:
        """The text of an answer after which the conversation goes on, as in training."""
        return f" {_answer(Turn('assistant', answer))}\n\n"


def clean(text: str) -> str:
    """What system or user say, without blank lines, which would end their turn."""
    return _BLANK_LINES.sub("\n", text.replace("\r\n", "\n")).strip()


def _with_tools(conversation: Conversation) -> list[Turn]:
    turns = list(conversation.turns)
    if not conversation.tools:
        return turns
    tools = ",\n".join(_json(_described(tool.get("function", tool))) for tool in conversation.tools)
    text = f"Tools:\n[\n{tools}\n]\nReturn only a JSON function call."
    if turns[0].role == "system":
        return [Turn("system", f"{turns[0].text}\n{text}"), *turns[1:]]
    return [Turn("system", text), *turns]


def _described(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {}
    arguments = function.get("arguments", parameters.get("properties", {}))
    names = [name for name in ("name", "description") if name in function]
    return {name: function[name] for name in names} | {"arguments": arguments}


def _answer(turn: Turn) -> str:
    text = turn.text.replace("\r\n", "\n").strip()
    calls = [f"```json\n{_json(call)}\n```" for call in turn.calls]
    said = "\n".join([text, *calls] if text else calls)
    thinking = turn.thinking.replace("\r\n", "\n").strip()
    return f"<think>\n{thinking}\n</think>\n{said}" if thinking else said


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
