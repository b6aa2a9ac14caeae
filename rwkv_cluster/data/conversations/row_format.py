"""What the rows of a JSONL file are: text, or tokens with labels; told by `data.format` or by the first rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.inputs.bad_lines import BadLine
from rwkv_cluster.data.inputs.labelled_tokens import is_labelled
from rwkv_cluster.data.inputs.readers import line_blocks, parse_object
from rwkv_cluster.data.inputs.sources import Source
from rwkv_cluster.errors import DataError

log = logging.getLogger("rwkv_cluster")

RowFormat = Literal["text", "tokens"]
_FIRST_ROWS = 16  # that are looked at


@dataclass(frozen=True)
class RowRules:
    """How the rows of JSONL files become documents. formats: of each file; one that is not there holds text."""

    formats: Mapping[Path, RowFormat] = field(default_factory=dict)

    def format_of(self, path: Path) -> RowFormat:
        """What the rows of a file are."""
        return self.formats.get(path, "text")

    @property
    def have_marks(self) -> bool:
        """Whether there are tokens that are not trained on."""
        return "tokens" in self.formats.values()

    @property
    def name(self) -> str:
        """What rows there are, for the manifest: "text", "tokens" or several."""
        return "+".join(sorted(set(self.formats.values()))) or "text"


TEXT_ROWS = RowRules()


def row_rules(data: DataConfig, sources: Iterable[Source]) -> RowRules:
    """What `data.format` says of the rows, or what their first rows say. Raises DataError where there are no rows."""
    if data.format == "auto":
        return RowRules({source.path: _told(source, data.text_field) for source in sources if source.kind == "jsonl"})
    if data.format != "text":
        for source in sources:
            if source.kind != "jsonl":
                raise DataError(
                    f"{source.path} is no JSONL, and data.format is '{data.format}'",
                    remedy="Write one JSON object a line into a .jsonl file, or set data.format to auto",
                )
    return RowRules({source.path: data.format for source in sources if source.kind == "jsonl"})


def _told(source: Source, text_field: str) -> RowFormat:
    """What the first row that can be read is; text where none says anything."""
    lines = (line for block in line_blocks(source) for _, line in block.lines())
    for line in islice(lines, _FIRST_ROWS):
        try:
            row = parse_object(line, text_field)
        except BadLine:
            continue
        if text_field in row:
            return "text"
        if is_labelled(row):
            log.info(
                "%s: its rows are tokens with labels, as the first one is; data.format can say otherwise", source.path
            )
            return "tokens"
    return "text"
