"""What tests read from a report: its numbers, its elements, and what a browser would load."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart. numbers: of the embedded JSON; references: attributes that name something to load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self.scripts: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    @property
    def numbers(self) -> dict[str, Any]:
        (script,) = self.scripts
        return dict(json.loads(script))

    def series(self, name: str, run: int = 0) -> dict[str, Any]:
        return dict(self.numbers["runs"][run]["series"][name])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.add(tag)
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        assert not any(name.startswith("on") for name in attributes), attributes
        if tag == "script":
            assert attributes["type"] == "application/json"
            self.scripts.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._open[-1:] != ["style"]:
            self.text += data


def records(work_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / "logs" / name).read_text().splitlines()]
