"""What the rows of a JSONL file are: text, conversations, or tokens with labels; told by `data.format`, or by them.

A row that has the field of text is text, whatever else it has, unless `data.format` says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.conversations.schemas import schema_of
from rwkv_cluster.data.conversations.template import Template, load_template
from rwkv_cluster.data.inputs.bad_lines import BadLine
from rwkv_cluster.data.inputs.labelled_tokens import is_labelled
from rwkv_cluster.data.inputs.readers import line_blocks, parse_object
from rwkv_cluster.data.inputs.sources import Source
from rwkv_cluster.errors import DataError

log = logging.getLogger("rwkv_cluster")

RowFormat = Literal["text", "conversations", "tokens"]
_FIRST_ROWS = 16  # that are looked at


@dataclass(frozen=True)
class RowRules:
    """How the rows of JSONL files become documents.

    formats: of each file; one that is not there holds text. template: of conversations, where there are some.
    answers_only: whether only the answers of conversations are trained on.
    """

    formats: Mapping[Path, RowFormat] = field(default_factory=dict)
    template: Template | None = None
    answers_only: bool = True

    def format_of(self, path: Path) -> RowFormat:
        """What the rows of a file are."""
        return self.formats.get(path, "text")

    @property
    def have_marks(self) -> bool:
        """Whether there are tokens that are not trained on."""
        formats = set(self.formats.values())
        return "tokens" in formats or ("conversations" in formats and self.answers_only)

    @property
    def name(self) -> str:
        """What rows there are, for the manifest: "text", "conversations", "tokens", or several joined by +."""
        return "+".join(sorted(set(self.formats.values()))) or "text"


TEXT_ROWS = RowRules()


def row_rules(data: DataConfig, sources: Iterable[Source]) -> RowRules:
    """What `data.format` says of the rows, or what their first rows say.

    Raises DataError where there are no rows, and as `load_template`.
    """
    if data.format not in ("auto", "text"):
        for source in sources:
            if source.kind != "jsonl":
                raise DataError(
                    f"{source.path} is no JSONL, and data.format is '{data.format}'",
                    remedy="Write one JSON object a line into a .jsonl file, or set data.format to auto",
                )
    formats: dict[Path, RowFormat] = {
        source.path: _told(source, data.text_field) if data.format == "auto" else data.format
        for source in sources
        if source.kind == "jsonl"
    }
    template = load_template(data.template) if "conversations" in formats.values() else None
    return RowRules(formats, template, answers_only=data.train_on == "answers")


def _told(source: Source, text_field: str) -> RowFormat:
    """What the first row that can be read is; text where none says anything, or the field of text was named."""
    if text_field != DataConfig.model_fields["text_field"].default:
        return "text"
    lines = (line for block in line_blocks(source) for _, line in block.lines())
    for line in islice(lines, _FIRST_ROWS):
        try:
            row = parse_object(line, text_field)
        except BadLine:
            continue
        if text_field in row:
            return "text"
        if is_labelled(row):
            _say(source, "tokens", "tokens with labels")
            return "tokens"
        if (schema := schema_of(row)) is not None:
            _say(source, "conversations", schema.name)
            return "conversations"
    return "text"


def _say(source: Source, row_format: RowFormat, what: str) -> None:
    log.info("%s: taken for %s (%s, by its first row); data.format can say otherwise", source.path, row_format, what)
