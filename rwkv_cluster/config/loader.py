"""A YAML file and overrides become a `Config`, and a `Config` becomes text again.

Every fault is one line with its place: `tiny.yaml:12: model.n_layer is 'six', expected an integer >= 1 and <= 1024`.
Types are strict, because YAML's text and numbers are easily confused: nothing is converted except an integer
where a number is expected. `python -m rwkv_cluster.config.loader` prints docs/configuration.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rwkv_cluster.config.field_types import (
    convert,
    describe_type,
    found_text,
    is_section,
    iterate_fields,
    mismatch,
    unknown_field,
)
from rwkv_cluster.config.include import read_file, with_included
from rwkv_cluster.config.schema import Config, InvalidFields, Section, open_sizes
from rwkv_cluster.config.yaml_reader import MAX_DEPTH, Node, parse_argument, parse_scalar, parse_yaml, shown
from rwkv_cluster.errors import ConfigError

DEFAULT = "default"
MAX_FAULTS = 20  # told at once


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and, for every dotted field name, where its value came from.

    A source is `default`, `file.yaml:12`, or the override as given.
    """

    config: Config
    sources: dict[str, str]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Configuration in a YAML file with overrides. Raises ConfigError with one line per fault."""
    return resolve_config(path, overrides).config


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Load a configuration and keep where each value came from."""
    return parse_config(read_file(Path(path)), shown(str(path), 4096), overrides, include_from=[Path(path).parent])


def parse_config(
    content: bytes, name: str, overrides: Sequence[str] = (), *, include_from: Sequence[Path] | None = None
) -> ResolvedConfig:
    """Configuration in YAML bytes. `name` stands for the file in messages; overrides may start with `--`.

    include_from: folders in which `include` looks before it takes a shipped recipe; None: the text includes nothing.
    """
    root = parse_yaml(content, name)
    if root.value is None:
        raise ConfigError(
            f"{name}: the file has no settings", remedy="Write at least one, for instance `work_dir: work`"
        )
    if not isinstance(root.value, dict):
        raise ConfigError(f"{root.origin}: expected `name: value` lines, found {found_text(root)}")
    root = with_included(root, include_from)
    for override in overrides:
        root = _overridden(root, override)
    return _Reader(name).read(root)


def _overridden(root: Node, override: str) -> Node:
    """`root` with one `section.field=value` set; values inside a mapping are set one by one."""
    name, equals, text = override.removeprefix("--").partition("=")
    origin = f"--{shown(name)}={shown(text)}"
    if not equals or not all(name.split(".")) or name.count(".") > MAX_DEPTH:
        raise ConfigError(f"{shown(override)}: an override is written --section.field=value")
    return _set(root, name.split("."), parse_argument(text, origin), origin)


def _set(node: Node | None, names: list[str], leaf: Node, origin: str) -> Node:
    if not names:
        if not (isinstance(leaf.value, dict) and node is not None and isinstance(node.value, dict)):
            return leaf
        for name, child in leaf.value.items():
            node = _set(node, [name], child, origin)
        return node
    fields = dict(node.value) if node is not None and isinstance(node.value, dict) else {}
    fields[names[0]] = _set(fields.get(names[0]), names[1:], leaf, origin)
    return Node(fields, "", node.origin if node is not None and node.value else origin)


class _Reader:
    """Checks a tree of nodes against the configuration's types, collecting every fault before it gives up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.faults: list[str] = []
        self.nodes: dict[str, Node] = {}  # by dotted name

    def read(self, root: Node) -> ResolvedConfig:
        values = self._section(Config, root, "")
        config = None
        try:
            config = Config(**values)
        except InvalidFields as error:
            # A rule between fields would only repeat, or be misled by, a field that was left out as faulty.
            errors = [e for e in error.faults if not self.faults or e["type"] != "value_error"]
            self.faults += [self._explain(e) for e in errors]
        if self.faults or config is None:
            more = ["(only the first faults are listed)"] if len(self.faults) >= MAX_FAULTS else []
            raise ConfigError("\n".join(dict.fromkeys(self.faults + more)))
        sources = {field: self._source(field) for field, _ in iterate_fields(Config)}
        return ResolvedConfig(config, sources)

    def _source(self, field: str) -> str:
        return self.nodes[field].origin if field in self.nodes else DEFAULT

    def _section(self, section: type[Section], node: Node, prefix: str) -> dict[str, Any]:
        self.nodes[prefix.rstrip(".")] = node
        if node.value is None:  # every line of the section is commented out
            return {}
        if not isinstance(node.value, dict):
            names = ", ".join(section.model_fields)
            shown_text = "" if isinstance(node.value, list) else f" {found_text(node)}"
            self.faults.append(
                f"{node.origin}: {prefix[:-1]} is{shown_text or ' a list'}, expected a section with {names}"
            )
            return {}
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            if len(self.faults) >= MAX_FAULTS:
                break
            field = section.model_fields.get(name)
            if field is None:
                self.faults.append(f"{child.origin}: {unknown_field(section, prefix, name)}")
            elif is_section(field.annotation):
                values[name] = self._section(field.annotation, child, f"{prefix}{name}.")
            else:
                self.nodes[f"{prefix}{name}"] = child
                try:
                    values[name] = convert(f"{prefix}{name}", field, child)
                except ConfigError as fault:
                    self.faults.append(str(fault))
        return values

    def _explain(self, error: Any) -> str:
        """One line for a pydantic error: a range that is not met, or a rule of config.py."""
        location = ".".join(str(part) for part in error["loc"])
        node = self.nodes.get(location)
        if error["type"] == "value_error":
            message = str(error["ctx"]["error"])
            section = f"{location}: " if location else ""
            return f"{self._place(location, message)}: {section}{message}"
        field = next((field for name, field in iterate_fields(Config) if name == location), None)
        if node is None or field is None:
            return f"{self._place(location, '')}: {location}: {error['msg']}"
        return str(mismatch(location, field, node))

    def _place(self, location: str, message: str) -> str:
        """Origin of the field that the message names first, else of the section, else the file."""
        prefix = f"{location}." if location else ""
        names = [f"{prefix}{name}" for name in re.findall(r"\w+(?:\.\w+)*", message)]
        named = [self.nodes[name].origin for name in names if name in self.nodes]
        if named:
            return named[0]
        return self.nodes[location].origin if location in self.nodes else self.name


def dump_yaml(config: Config, sources: Mapping[str, str] | None = None) -> str:
    """YAML text that loads to an equal `Config`; with `sources`, comments say where each value came from.

    Sizes that training.init_from's weights are to say are left out.
    """
    values = config.model_dump()
    for name in open_sizes(config) if config.training.init_from is not None else ():
        del values["model"][name]
    lines = list(yaml_lines(values, "", sources or {}, 0))
    width = min(60, max(len(line) for line, _ in lines))
    return "".join(f"{line:<{width}}  # {note}\n" if note else f"{line}\n" for line, note in lines)


def dump_json(config: Config) -> str:
    """JSON text of the configuration, indented by 2, in field order, and of the two values that rwkv-trainer's has."""
    values = config.model_dump(mode="json")
    values |= {"wandb_project": config.logging.wandb_project, "vocab_size": config.model.vocab_size}
    return json.dumps(values, indent=2) + "\n"


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of fields with dotted names."""
    sections: dict[str, Any] = {}
    for name, value in fields.items():
        *outer, field = name.split(".")
        reduce(lambda section, part: section.setdefault(part, {}), outer, sections)[field] = value
    return sections


def yaml_lines(
    values: Mapping[str, Any], prefix: str, sources: Mapping[str, str], depth: int
) -> Iterator[tuple[str, str]]:
    """Lines of a file with `values` in sections below `prefix`, each with what `sources` says of its field, or ""."""
    indent = "  " * depth
    for name, value in values.items():
        source = sources.get(f"{prefix}{name}", "")
        if isinstance(value, dict) and value:
            yield f"{indent}{yaml_text(name)}:", source
            yield from yaml_lines(value, f"{prefix}{name}.", sources, depth + 1)
        elif isinstance(value, (list, tuple)) and value:
            yield f"{indent}{yaml_text(name)}:", source
            yield from ((f"{indent}  - {yaml_value(item)}", "") for item in value)
        else:
            yield f"{indent}{yaml_text(name)}: {yaml_value(value)}", source


def yaml_value(value: Any) -> str:
    """A value of a field as YAML on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{yaml_text(name)}: {yaml_value(item)}' for name, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    return yaml_text(value)


def yaml_text(text: str) -> str:
    """`text` as YAML that reads back as the same text: plain where possible, else double-quoted."""
    if re.fullmatch(r"[A-Za-z_/.][A-Za-z0-9_/.\-]*", text) and parse_scalar(text) == text:
        return text
    return f'"{"".join(_escaped(character) for character in text)}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08X}"


def field_table() -> str:
    """docs/configuration.md: a Markdown table of every field for each section, made from config.py."""
    parts = [
        "# Configuration\n",
        "A run is one YAML file. Every field below may stand in the file, and on the command line as\n"
        "`--section.field=value`, which wins over the file. Unknown fields are refused. Relative paths are\n"
        "relative to the current directory; in `work_dir`, `data.inputs`, `data.tokenizer.vocab_file` and `path`,\n"
        "`training.init_from` and `launch.hostfile`, `~` and variables such as `$SCRATCH` are replaced when the file\n"
        "is read. The other fields of `launch` are for the nodes and are left as they are.\n"
        "`rwkv-cluster config CONFIG` shows every value and its source.\n",
        "`include: base.yaml` or `include: [sizes/2.9b.yaml, tasks/lora.yaml]` begins a file with the fields of\n"
        "others, by paths relative to it, or by names of recipes that come with the package; a later file wins over\n"
        "an earlier one, and the file's own fields over all. Included files include nothing. A list is replaced, a\n"
        "mapping such as `launch.env` filled up. What a run keeps is the whole.\n",
        "This page is generated from `rwkv_cluster/config/schema.py`: `python -m rwkv_cluster.config.loader > "
        "docs/configuration.md`.\n",
    ]
    parts += _section_tables(Config, "", "Top level")
    return "\n".join(parts)


def _section_tables(section: type[Section], prefix: str, title: str) -> list[str]:
    first = (section.__doc__ or "").strip().splitlines()[0]
    rows = ["| field | accepts | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            nested += _section_tables(field.annotation, f"{prefix}{name}.", f"`{prefix}{name}`")
            continue
        default = yaml_value(field.get_default(call_default_factory=True))
        cells = (f"`{prefix}{name}`", describe_type(field), f"`{default}`", field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return [f"## {title}\n", f"{first}\n", "\n".join(rows) + "\n", *nested]


if __name__ == "__main__":
    sys.stdout.write(field_table())
