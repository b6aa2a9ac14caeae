"""Why a line of JSONL is no JSON, in words about what cannot be seen in it, and what to do about the whole file."""

from __future__ import annotations

import json
import re

FIX = "Fix the line or set data.skip_bad_lines"
ONE_A_LINE = "JSONL has one object a line"
SPLIT_ARRAY = (
    "Convert the file: CAT | python3 -c 'import json, sys; "
    """[print(json.dumps(d if type(d) is dict else {"text": d})) for d in json.load(sys.stdin)]' > NEW-lines.jsonl"""
)
_JOIN = "Convert the file: CAT | jq -c . > NEW-lines.jsonl"
_BOM = b"\xef\xbb\xbf"
_TYPOGRAPHIC_QUOTES = tuple("\u201c\u201d\u201e\u2018\u2019")
_PYTHON_WORD = re.compile(r"'|None\b|True\b|False\b")


class BadLine(Exception):
    """A JSONL line that breaks a rule; the message says which, without the place. remedy: what to do about it."""

    def __init__(self, reason: str, remedy: str = FIX) -> None:
        super().__init__(reason)
        self.remedy = remedy


def bad_bytes(line: bytes) -> BadLine | None:
    """What is wrong with bytes that no line of JSON holds, or None where there are none."""
    if line.startswith(_BOM):
        return BadLine("begins with a byte order mark (BOM), as where files were joined")
    if b"\0" in line:
        return BadLine(
            f"has a zero byte (NUL) at byte {line.index(0)} of the line, as a crash, a full disk or UTF-16 leaves"
        )
    if b"\r" in line:
        remedy = "Convert the file: CAT | tr '\\r' '\\n' > NEW-lines.jsonl"
        return BadLine("has a carriage return (CR) in it: JSONL's line ends are LF or CR LF", remedy)
    if line.startswith(b"\x1e"):
        return BadLine(
            "begins with a record separator, as in a JSON text sequence",
            "Convert the file: CAT | tr -d '\\036' > NEW-lines.jsonl",
        )
    return None


def bad_json(text: str, end: int | None, error: json.JSONDecodeError) -> BadLine:
    """What is wrong with a line that is not JSON. end: where its first value ends; None: it has none."""
    if end is not None:
        return _after_a_value(text[end:].lstrip()) or _plain(error)
    if text.startswith("[") and text.endswith(("[", "{", ",")):
        return BadLine("is the beginning of a JSON array", SPLIT_ARRAY)
    if text.endswith(("{", "[", ",", ":")) and error.pos >= len(text):
        return BadLine(f"is a part of a JSON value of several lines; {ONE_A_LINE}", _JOIN)
    at = text[error.pos : error.pos + 8]
    if at.startswith(_TYPOGRAPHIC_QUOTES):
        return BadLine(f'has a typographic quote {at[0]} at character {error.pos + 1}, and JSON wants "')
    if _PYTHON_WORD.match(at):
        return BadLine(f"is not JSON at character {error.pos + 1}, but what Python prints: write it with json.dumps")
    if at and not at[0].isprintable():
        character = f"U+{ord(at[0]):04X} at character {error.pos + 1}"
        return BadLine(f"is not JSON: a control character or one that cannot be seen, {character}")
    return _plain(error)


def _after_a_value(rest: str) -> BadLine | None:
    if rest.startswith(","):
        return BadLine(
            "has a comma after the object; JSONL has nothing between its lines",
            "Remove the commas at the line ends: CAT | sed 's/,[[:space:]]*$//' > NEW-lines.jsonl",
        )
    if rest.startswith("{"):
        return BadLine(f"has several objects; {ONE_A_LINE}", _JOIN)
    return None


def _plain(error: json.JSONDecodeError) -> BadLine:
    return BadLine(f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}")
