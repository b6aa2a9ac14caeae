"""The schemas of rows that hold a conversation: which fields tell one, and how it is read. A schema is a row here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rwkv_cluster.data.conversations.turns import Conversation, Role, Turn
from rwkv_cluster.data.conversations.world_text import parse_world_text
from rwkv_cluster.data.inputs.bad_lines import BadLine
from rwkv_cluster.data.inputs.readers import field_names, kind_name

Row = dict[str, Any]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "target"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("input", "output"),
)
_THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Schema:
    """One kind of row: its name in messages, whether a row is of this kind, and its turns. `read` raises BadLine."""

    name: str
    recognises: Callable[[Row], bool]
    read: Callable[[Row], list[Turn]]


def schema_of(row: Row) -> Schema | None:
    """The schema that a row is of, or None."""
    return next((schema for schema in SCHEMAS if schema.recognises(row)), None)


def read_conversation(row: Row, text_field: str) -> Conversation:
    """The conversation of a row, or of World text in its field `text_field`. Raises BadLine."""
    schema = schema_of(row)
    if schema is not None:
        turns = schema.read(row)
    elif isinstance(row.get(text_field), str):
        turns = list(parse_world_text(row[text_field]))
    else:
        raise BadLine(
            f'has no conversation (it has {field_names(row)}), expected "messages", "conversations", "prompt" and '
            f'"completion", "instruction" and "output", or World text in "{text_field}"'
        )
    for number, turn in enumerate(turns, 1):
        if turn.is_empty and turn.role != "system":
            raise BadLine(f"has an empty turn: number {number}, of the {turn.role}")
    said = tuple(turn for turn in turns if not turn.is_empty)
    if not said:
        raise BadLine("has no turns")
    return Conversation(said, _tools(row.get("tools")))


def _messages(row: Row, field: str) -> list[Turn]:
    messages = row[field]
    if not isinstance(messages, list):
        raise BadLine(f'"{field}" is {kind_name(messages)}, expected a list of messages')
    return [_turn(message, f'"{field}"[{index}]') for index, message in enumerate(messages)]


def _turn(message: Any, place: str) -> Turn:
    """The turn of {"role", "content"} or {"from", "value"}."""
    if not isinstance(message, dict):
        raise BadLine(f"{place} is {kind_name(message)}, expected an object with a role")
    speaker = message.get("role", message.get("from"))
    name = speaker.lower() if isinstance(speaker, str) else ""
    role = _ROLES.get(name)
    if role is None:
        shown = f'"{speaker[:40]}"' if isinstance(speaker, str) else kind_name(speaker)
        raise BadLine(f"{place} has the role {shown}, expected system, user, assistant or tool")
    text = _text(message.get("content", message.get("value")), place)
    if role != "assistant":
        return Turn(role, text)
    calls = _calls(message.get("tool_calls"), place)
    if name == "function_call":
        text, calls = "", (_call(text, place),)
    thinking = next((message[field] for field in _THINKING if isinstance(message.get(field), str)), "")
    return Turn(role, text, thinking, calls, is_trained=message.get("weight", 1) != 0)


def _text(content: Any, place: str) -> str:
    """A message's text: a string, none, or a list of parts that are all text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadLine(f"{place} has {kind_name(content)} as its content, expected a string")
    texts = [part["text"] for part in content if _is_text(part)]
    if len(texts) < len(content):
        raise BadLine(f"{place} has a content that is not all text")
    return "".join(texts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _calls(calls: Any, place: str) -> tuple[dict[str, Any], ...]:
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise BadLine(f'{place} has {kind_name(calls)} as its "tool_calls", expected a list')
    return tuple(_call(call.get("function", call) if isinstance(call, dict) else call, place) for call in calls)


def _call(call: Any, place: str) -> dict[str, Any]:
    """{"name", "arguments"}, where the call or its arguments may be JSON in a string."""
    call = _from_json(call)
    arguments = _from_json(call.get("arguments", {})) if isinstance(call, dict) else None
    if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
        raise BadLine(f'{place} has a call that is no "name" with an object of "arguments"')
    return {"name": call["name"], "arguments": arguments}


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Descriptions of functions: a list of objects, or JSON of one in a string."""
    tools = _from_json(tools) if tools else []
    if not isinstance(tools, list):
        raise BadLine(f'"tools" is {kind_name(tools)}, expected a list of functions')
    if not all(_is_function(tool) for tool in tools):
        raise BadLine('"tools" has something that is no function with a name and an object of parameters')
    return tuple(tools)


def _is_function(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("parameters") or {}, dict)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _system(row: Row) -> list[Turn]:
    return [Turn("system", _field(row, "system"))] if row.get("system") else []


def _field(row: Row, name: str) -> str:
    """A field's text, empty where there is none."""
    return _text(row.get(name), f'"{name}"')


def _conversation_turns(row: Row) -> list[Turn]:
    return [*_system(row), *_messages(row, "conversations")]


def _alpaca_turns(row: Row) -> list[Turn]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadLine('"history" is not a list of questions with their answers')
    earlier = [_text(said, f'"history"[{index}]') for index, pair in enumerate(history) for said in pair]
    roles: tuple[Role, Role] = ("user", "assistant")
    question = "\n".join(text for name in ("instruction", "input") if (text := _field(row, name)).strip())
    texts = [*earlier, question, _field(row, "output")]
    return [*_system(row), *(Turn(roles[index % 2], text) for index, text in enumerate(texts))]


def _pair_of(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)


def _pair_turns(row: Row) -> list[Turn]:
    """Question and answer: two texts, or two lists of messages, of which the first is not learned."""
    question, answer = _pair_of(row) or _PAIRS[0]
    if isinstance(row[question], list) and isinstance(row[answer], list):
        asked = [replace(turn, is_trained=False) for turn in _messages(row, question)]
        return [*_system(row), *asked, *_messages(row, answer)]
    return [*_system(row), Turn("user", _field(row, question)), Turn("assistant", _field(row, answer))]


SCHEMAS = (
    Schema("messages", lambda row: "messages" in row, lambda row: [*_system(row), *_messages(row, "messages")]),
    Schema("ShareGPT", lambda row: "conversations" in row, _conversation_turns),
    Schema("Alpaca", lambda row: "instruction" in row and "output" in row, _alpaca_turns),
    Schema("prompt and completion", lambda row: _pair_of(row) is not None, _pair_turns),
)
