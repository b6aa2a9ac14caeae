"""What each configuration field accepts: in words, and as a check of a YAML node against its annotation."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rwkv_cluster.config.schema import Config, Section
from rwkv_cluster.config.yaml_reader import Node, parse_scalar, shown
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.terminal.nearest import nearest

_LARGEST_INTEGER = 2**63 - 1
_LONGEST_NAME = 80  # that is compared with the valid ones
_COUNT_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_TIME_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_TRUTHS = {"yes": "true", "on": "true", "y": "true", "1": "true"} | dict.fromkeys(("no", "off", "n", "0"), "false")


def convert(name: str, field: FieldInfo, node: Node) -> Any:
    """Python value of `node` for the field with dotted `name`. Ranges are left to the model.

    Raises ConfigError: `file.yaml:12: model.n_layer is 'six', expected an integer >= 1 and <= 1024`.
    """
    return _converted(name, field, field.annotation, node)


def mismatch(name: str, field: FieldInfo, node: Node, hint: str = "", verb: str = "is") -> ConfigError:
    """The error that `node` is not what the field accepts; `hint` says how it is written instead."""
    ending = f". {hint}" if hint else ""
    return ConfigError(f"{node.origin}: {name} {verb} {found_text(node)}, expected {describe_type(field)}{ending}")


def found_text(node: Node) -> str:
    """A node's value for a message: text in quotes, numbers as written."""
    if isinstance(node.value, (list, dict)):
        return "a list" if isinstance(node.value, list) else "a section"
    if node.value is None:
        return "null"
    return f"'{shown(node.text)}'" if isinstance(node.value, str) else shown(node.text)


def _converted(name: str, field: FieldInfo, annotation: Any, node: Node) -> Any:
    value = node.value
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        parts = [part for part in arguments if part is not type(None)]
        is_list = isinstance(value, list)
        return _converted(name, field, next((p for p in parts if (get_origin(p) is list) == is_list), parts[0]), node)
    if origin is list:
        if not isinstance(value, list):
            raise mismatch(name, field, node, f"Write [{shown(node.text)}]" if node.text and value is not None else "")
        return [_converted(f"{name}[{index}]", field, arguments[0], item) for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise mismatch(name, field, node)
        return {key: _converted(f"{name}.{shown(key)}", field, arguments[1], item) for key, item in value.items()}
    if origin is Literal:
        if type(value) not in map(type, arguments) or value not in arguments:
            near = nearest(node.text[:_LONGEST_NAME], map(str, arguments), 0.7)
            raise mismatch(name, field, node, f"Nearest: {near}" if near else "")
        return value
    if annotation is str:
        return _text(name, field, node)
    if annotation is bool and not isinstance(value, bool):
        truth = _TRUTHS.get(node.text.lower())
        raise mismatch(name, field, node, f"Write {truth}" if truth else "")
    if annotation in (int, float):
        return _number(name, field, annotation, node)
    return _plain(node)


def _plain(node: Node) -> Any:
    """The value of a tree of nodes, of whatever type it is."""
    if isinstance(node.value, list):
        return [_plain(item) for item in node.value]
    if isinstance(node.value, dict):
        return {name: _plain(item) for name, item in node.value.items()}
    return node.value


def _text(name: str, field: FieldInfo, node: Node) -> str:
    if isinstance(node.value, str):
        return node.value
    if not isinstance(node.value, (bool, int, float)):
        raise mismatch(name, field, node)
    if node.origin.startswith("--"):
        return node.text  # the shell has taken the quotes, and the field is text: no doubt is possible
    raise mismatch(name, field, node, f'Put it in quotes: "{node.text}"')


def _number(name: str, field: FieldInfo, kind: type[int] | type[float], node: Node) -> int | float:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise mismatch(name, field, node, _number_hint(name, node))
    if kind is int and abs(value) > _LARGEST_INTEGER:
        raise mismatch(name, field, node, "The largest integer is 2^63 - 1")
    if not abs(value) <= sys.float_info.max:
        raise mismatch(name, field, node, "The number must be finite")
    return kind(value)


def _number_hint(name: str, node: Node) -> str:
    """How a number was probably meant: without its quotes, its unit, its separators or its exponent."""
    text = node.text.strip()
    if len(text) > _LONGEST_NAME:
        return ""
    if isinstance(node.value, float) and math.isfinite(node.value) and node.value.is_integer():
        return f"Write {int(node.value)}" if abs(node.value) <= _LARGEST_INTEGER else ""
    if isinstance(node.value, str) and not node.plain and _reads_as_number(text):
        return "Remove the quotes"
    if re.fullmatch(r"[0-9]{1,3}([_,' ][0-9]{3})+|[0-9]+(_[0-9]+)+", text):
        return f"Write {re.sub('[^0-9]', '', text)}"
    if match := re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{1,5})", text):
        factor = (_TIME_UNITS if name.endswith("_s") else _COUNT_UNITS).get(match[2])
        plain = f": {float(match[1]) * factor:.15g}" if factor else ""
        return f"Write the number without a unit{plain}"
    return ""


def _reads_as_number(text: str) -> bool:
    try:
        return type(parse_scalar(text)) in (int, float)
    except ValueError:
        return False


def unknown_field(section: type[Section], prefix: str, name: str) -> str:
    """Sentence about a field that `section`, at dotted `prefix`, does not have, with the nearest name."""
    where = f"{prefix[:-1]} has" if prefix else "the configuration has"
    return f"{where} no field '{shown(name)}'. {nearest_field(section, prefix, name)}"


def nearest_field(section: type[Section], prefix: str, name: str) -> str:
    """Sentence with the field most like `name`: of `section`, else of any section, else all fields of `section`."""
    if near := nearest(name[:_LONGEST_NAME], section.model_fields):
        return f"Nearest: {prefix}{near}"
    every = [field for field, _ in iterate_fields(Config)]
    same = next((field for field in every if field.rpartition(".")[2] == name), None)
    if same is None:
        last_names = {field.rpartition(".")[2]: field for field in every}
        same = last_names.get(nearest(name[:_LONGEST_NAME], last_names, 0.8) or "")
    return f"Nearest: {same}" if same else f"Valid names: {', '.join(section.model_fields)}"


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field's annotation is a section of the configuration."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def iterate_fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field below `section` with its dotted name, in file order."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from iterate_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe_type(field: FieldInfo) -> str:
    """What a field accepts, in words with its valid range: `an integer >= 1, or null`."""
    annotation = field.annotation
    optional = type(None) in get_args(annotation)
    parts = [argument for argument in get_args(annotation) if argument is not type(None)]
    is_union = get_origin(annotation) in (Union, types.UnionType)
    words = ", or ".join(map(_type_words, parts if is_union else [annotation]))
    bounds = _range_words(field.metadata)
    return f"{words}{' ' if bounds else ''}{bounds}{', or null' if optional else ''}"


def _type_words(annotation: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is Literal:
        *rest, last = [str(choice) for choice in get_args(annotation)]
        return f"{', '.join(rest)} or {last}" if rest else last
    if get_origin(annotation) is list:
        of_what = {str: "a list of text such as [a, b]", list[float]: "a list of lists of numbers"}
        return of_what.get(get_args(annotation)[0], "a list")
    return "a mapping of names to values" if get_origin(annotation) is dict else str(annotation)


def _range_words(metadata: Sequence[Any]) -> str:
    symbols = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = []
    for constraint in metadata:
        for attribute, symbol in symbols.items():
            limit = getattr(constraint, attribute, None)
            if limit is not None:
                number = str(limit) if isinstance(limit, int) else f"{limit:g}"
                bounds.append(f"{symbol} {'2^63 - 1' if limit == _LARGEST_INTEGER else number}")
        if getattr(constraint, "min_length", None):
            bounds.append("that is not empty")
    return " and ".join(bounds)
