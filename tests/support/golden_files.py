"""Golden files: what a test compares with, and what `pytest --update-golden` writes anew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

FLAG = "--update-golden"


class Golden:
    """The files below `folder`. update: whether one that differs is written anew instead of failing its test."""

    def __init__(self, folder: Path, *, update: bool) -> None:
        self.folder = folder
        self.update = update

    def check_text(self, name: str, text: str) -> None:
        """`text` is that of the file `name`."""
        path = self.folder / name
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.read_text() == text, f"{path} differs. If that is meant: pytest {FLAG}"

    def check_numbers(self, name: str, key: str, values: Sequence[float], *, rel: float) -> None:
        """`values` are those below `key` in the JSON file `name`, each to `rel`; within it none is written anew."""
        path = self.folder / name
        curves = json.loads(path.read_text()) if path.exists() else {}
        if self.update and curves.get(key) != pytest.approx(values, rel=rel):
            path.write_text(json.dumps(curves | {key: list(values)}, indent=1) + "\n")
            return
        assert values == pytest.approx(curves[key], rel=rel), f"{path} differs. If that is meant: pytest {FLAG}"
