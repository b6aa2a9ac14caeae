"""HTML from plain text. Everything that comes from a file passes through `escape` here, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape as _escape
from typing import Any


def escape(text: object) -> str:
    """Text for an element or a quoted attribute; characters that HTML does not allow become visible."""
    shown = (
        character if character.isprintable() or character in "\n\t" else f"\\u{ord(character):04x}"
        for character in str(text)
    )
    return _escape("".join(shown), quote=True)


def table(
    label: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Sequence[int] = (),
    unbroken: Sequence[int] = (),
) -> str:
    """A table whose first column heads the rows. numbers: columns that are aligned to the right. unbroken: that, as
    numbers, keep to one line.
    """

    def cell(tag: str, place: int, text: object, scope: str = "") -> str:
        looks = ' class="number"' if place in numbers else ' class="unbroken"' if place in unbroken else ""
        scoped = f' scope="{scope}"' if scope else ""
        return f"<{tag}{scoped}{looks}>{escape(text)}</{tag}>"

    head = "".join(cell("th", place, name, "col") for place, name in enumerate(columns))
    lines = []
    for row in rows:
        first, *rest = row
        cells = [cell("th", 0, first, "row"), *(cell("td", place, text) for place, text in enumerate(rest, 1))]
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table></div>"
    )


def section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{''.join(content)}</section>\n"


def columns(*content: str) -> str:
    """Side by side where there is room."""
    return f'<div class="columns">{"".join(f"<div>{column}</div>" for column in content if column)}</div>\n'


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>\n"


def embedded(name: str, data: Any) -> str:
    """JSON that a script element may hold: no `<` ends it early. Raises ValueError for what JSON has no word for."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'
