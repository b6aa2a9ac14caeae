"""YAML text as a tree of values that remember where they were written. Knows YAML, not the configuration.

Only the parser's events are used and no constructor runs, so no tag can make an object. Scalars follow the
YAML 1.2 core schema: `no` and `12:30` are text, `1e-3` is a number, `0o7` is 7. Size, depth and alias
expansion are bounded, so a hostile file costs at most about a second and some ten megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Union

import yaml

from rwkv_cluster.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000
MAX_CHARACTERS = 4 << 20  # of all scalars after aliases are expanded

Value = Union[None, bool, int, float, str, "list[Node]", "dict[str, Node]"]

_TOO_DEEP = f"values are nested more than {MAX_DEPTH} deep"
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where the wheel has it: ten times faster
_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNQUOTED = re.compile(r"(?:^|[:\[,-])\s*([*&!%@`][^\s,\]}]*)")  # a glob, say, where YAML has its own use for the sign
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Node:
    """A value, the text it was written as, and its place.

    Attributes:
        value: None, bool, int, float, str, a list of nodes or a mapping of names to nodes.
        text: the scalar as written, without its quotes; empty for lists and mappings.
        origin: `file.yaml:12`, or the command-line argument.
        plain: a scalar without quotes.
        n_nodes, n_characters, depth: size of the tree below, aliases expanded.
    """

    value: Value
    text: str
    origin: str
    plain: bool = False
    n_nodes: int = 1
    n_characters: int = 0
    depth: int = 1


def shown(text: str, limit: int = 60) -> str:
    """`text` fit for one line of a message: cut at `limit` characters, unprintable ones escaped."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in cut)


def parse_scalar(text: str) -> bool | int | float | str | None:
    """Value of a plain scalar under the YAML 1.2 core schema. Raises ValueError for thousands of digits."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def parse_yaml(content: bytes, name: str) -> Node:
    """The one document in `content`; `name` stands for the file in origins and messages.

    Raises ConfigError with `name:line` for whatever is not plain YAML data within the limits.
    """
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name}: the file is larger than {MAX_BYTES} bytes, which no configuration needs")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8", remedy="Save it as UTF-8"
        ) from error
    if bad := _FORBIDDEN.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise ConfigError(f"{name}:{line}: character {bad[0]!a} is not allowed in YAML", remedy="Remove it")
    return _Composer(text, name, numbered=True).document()


def parse_argument(text: str, origin: str) -> Node:
    """Value of a command-line argument: lists, mappings and quoted text as in YAML, else one plain scalar.

    Unlike in a file, `a: b` and `# c` are plain text here. Raises ConfigError naming `origin`.
    """
    if bad := _FORBIDDEN.search(text):
        raise ConfigError(f"{shown(origin)}: character {bad[0]!a} is not allowed here", remedy="Remove it")
    if text[:1] in ("[", "{", '"', "'"):
        if len(text.encode()) > MAX_BYTES:
            raise ConfigError(f"{shown(origin)}: the value is longer than {MAX_BYTES} bytes")
        return _Composer(text, shown(origin), numbered=False).document()
    try:
        return Node(parse_scalar(text), text, shown(origin), plain=True)
    except ValueError as error:
        raise ConfigError(f"{shown(origin)}: the number has too many digits") from error


class _Composer:
    """Turns the parser's events into nodes, within the limits."""

    def __init__(self, text: str, name: str, *, numbered: bool) -> None:
        self.text = text
        self.name = name
        self.numbered = numbered
        self.anchors: dict[str, Node] = {}
        self.n_nodes = 0
        self.n_characters = 0
        self.events: Iterator[Any] = yaml.parse(text, Loader=_PARSER)

    def document(self) -> Node:
        """The only document's root. Raises ConfigError."""
        try:
            root: Node | None = None
            for event in self.events:
                if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
                    continue
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self._fault(event, "a second document begins. A configuration is one document")
                    continue
                root = self._node(event, 1)
        except yaml.YAMLError as error:
            raise self._syntax_fault(error) from error
        if root is None:
            raise ConfigError(f"{self.name}: the file is empty")
        return root

    def _node(self, event: Any, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._fault(event, _TOO_DEEP)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if event.tag is not None:
            raise self._fault(event, f"the tag {shown(event.tag)} is not allowed. Write a plain value; text in quotes")
        self._count(event, 1, len(event.value) if isinstance(event, yaml.ScalarEvent) else 0)
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _scalar(self, event: Any) -> Node:
        plain = event.implicit[0]
        try:
            value = parse_scalar(event.value) if plain else event.value
        except ValueError as error:
            raise self._fault(event, "the number has too many digits") from error
        if not plain and ("\0" in event.value or _has_surrogate(event.value)):
            raise self._fault(event, "the text holds an escaped character that no name or text may have")
        return Node(value, event.value, self._origin(event), plain, 1, len(event.value), 1)

    def _sequence(self, start: Any, depth: int) -> Node:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return self._collection(items, items, start)

    def _mapping(self, start: Any, depth: int) -> Node:
        fields: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if isinstance(key.value, (list, dict)):
                raise self._fault(event, "a list or mapping cannot be a field name")
            if key.text in fields:
                first = fields[key.text].origin
                raise self._fault(event, f"'{shown(key.text)}' is given twice (first at {first}). Remove one")
            if key.plain and key.text == "<<":
                raise self._fault(event, "the merge key << is not part of YAML 1.2. Write the fields out, or name each")
            value = self._node(next(self.events), depth + 1)
            fields[key.text] = replace(value, origin=key.origin)
        return self._collection(fields, list(fields.values()), start)

    def _collection(self, value: Value, children: list[Node], start: Any) -> Node:
        return Node(
            value,
            "",
            self._origin(start),
            False,
            1 + sum(child.n_nodes for child in children),
            sum(child.n_characters for child in children),
            1 + max((child.depth for child in children), default=0),
        )

    def _alias(self, event: Any, depth: int) -> Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            name = f"*{shown(event.anchor)}"
            raise self._fault(
                event, f"{name} stands for nothing that is complete above it. Text goes in quotes: '{name}'"
            )
        if depth + node.depth - 1 > MAX_DEPTH:
            raise self._fault(event, _TOO_DEEP)
        self._count(event, node.n_nodes, node.n_characters)
        return node

    def _count(self, event: Any, n_nodes: int, n_characters: int) -> None:
        self.n_nodes += n_nodes
        self.n_characters += n_characters
        if self.n_nodes > MAX_NODES:
            raise self._fault(event, f"the file holds more than {MAX_NODES} values once its aliases are expanded")
        if self.n_characters > MAX_CHARACTERS:
            raise self._fault(
                event, f"the file holds more than {MAX_CHARACTERS} characters once its aliases are expanded"
            )

    def _origin(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}" if self.numbered else self.name

    def _fault(self, event: Any, message: str) -> ConfigError:
        return ConfigError(f"{self._origin(event)}: {message}")

    def _syntax_fault(self, error: yaml.YAMLError) -> ConfigError:
        mark = getattr(error, "problem_mark", None)
        problem = shown(
            str(getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"), 120
        )
        if mark is None:
            return ConfigError(f"{self.name}: this is not YAML: {problem}")
        where = f"{self.name}:{mark.line + 1}" if self.numbered else self.name
        if "nesting depth" in problem:  # libyaml reads ahead and has a limit of its own, of 1,000
            return ConfigError(f"{where}: {_TOO_DEEP}")
        line = self.text.splitlines()[mark.line : mark.line + 1]
        if line and "\t" in line[0][: len(line[0]) - len(line[0].lstrip())]:
            return ConfigError(f"{where}: the line is indented with a tab", remedy="YAML indents with spaces")
        if line and (pattern := _UNQUOTED.search(line[0])):
            text = shown(pattern[1])
            return ConfigError(
                f"{where}: {text} begins with {text[0]}, a sign of YAML's own", remedy=f"Write it in quotes: '{text}'"
            )
        return ConfigError(f"{where}: this is not YAML: {problem} (column {mark.column + 1})")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
