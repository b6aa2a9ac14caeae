"""The line at the foot of a terminal, drawn anew as work goes by; what is logged meanwhile appears above it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

log = logging.getLogger("rwkv_cluster")

_REFRESH_S = 0.2  # drawing takes a millisecond
_NARROW = 70  # columns, below which the line is one row of what fits

_drawn: LiveLine | None = None  # a terminal has one foot


def clock_time(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def can_draw() -> bool:
    """Whether stderr is a terminal that can move its cursor, and has no such line yet."""
    can = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return can and _drawn is None


class LiveLine:
    """One line. quiet: names of loggers that say the same, and are left out on the terminal meanwhile.

    first_to_go: names of parts, the least important first: where a row is too short, they are left out in this order.
    """

    def __init__(
        self, head: str, total: float, done: float, *, first_to_go: Sequence[str] = (), quiet: Sequence[str] = ()
    ) -> None:
        global _drawn
        _drawn = self
        self._terminal = sys.stderr
        self._first_to_go = first_to_go
        self._quiet = quiet
        self._drawn_at = 0.0
        self._rich = _rich_progress()
        self._task = self._rich.add_task(head, total=total, completed=int(done))
        self._rich.start()  # sys.stderr is rich's own from here on
        self._rich.console.show_cursor(True)  # a killed run cannot give a hidden one back
        self._handlers = _handlers_to(self._terminal)
        for handler in self._handlers:
            handler.setStream(sys.stderr)
            handler.addFilter(self._is_wanted)

    def show(self, done: float, head: str, parts: Mapping[str, str]) -> None:
        """Draw `head` and the parts, if the last time is long enough ago."""
        width = self._rich.console.width
        shown = self._fitting(head, parts, width - 1) if width < _NARROW else parts
        self._rich.update(self._task, completed=done, description=head + ", ".join(shown.values()))
        if time.monotonic() - self._drawn_at > _REFRESH_S:
            with suppress(OSError):  # the terminal is closed: the work goes on to its end
                self._rich.refresh()
            self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Leave the last line as it is."""
        global _drawn
        _drawn = None
        with suppress(OSError):
            self._rich.stop()
        for handler in self._handlers:
            handler.setStream(self._terminal)
            handler.removeFilter(self._is_wanted)

    def _fitting(self, head: str, parts: Mapping[str, str], width: int) -> dict[str, str]:
        shown = dict(parts)
        for name in self._first_to_go:
            if len(head + ", ".join(shown.values())) <= width:
                break
            shown.pop(name, None)
        return shown

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        return record.name not in self._quiet


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column

    console = Console(file=sys.stderr)
    bar: list[ProgressColumn] = [
        BarColumn(table_column=Column(width=20)),
        TextColumn("{task.percentage:3.0f}%", table_column=Column(width=4)),
    ]
    narrow = console.width < _NARROW
    column = Column(no_wrap=True, overflow="ellipsis") if narrow else Column(overflow="fold")
    text = TextColumn("{task.description}", markup=False, table_column=column)
    return Progress(*([] if narrow else bar), text, console=console, auto_refresh=False)


def _handlers_to(stream: TextIO) -> list[logging.StreamHandler[TextIO]]:
    streams = (handler for handler in log.handlers if isinstance(handler, logging.StreamHandler))
    return [handler for handler in streams if handler.stream is stream]
