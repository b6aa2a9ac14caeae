"""One line about the run that a person can read: a live one on a terminal, one per interval in the log.

    step 1200/5000: loss 3.512, val loss 3.704, 12,345 tokens/s, MFU 41.2 %, 20.1 GB, 1:23:45 left, checkpoint 1000

The loss is smoothed; tokens/s leave validation, checkpoints and exported weights out; the time left does not.
docs/metrics.md has the formulas.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.train.records import StepRecord

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

log = logging.getLogger("rwkv_cluster")
interval_log = logging.getLogger("rwkv_cluster.progress")

_SMOOTHING = 0.95
_REFRESH_S = 0.2  # drawing takes a millisecond


class Progress:
    """Shows each step's record, with the time left to the run's true last step, validations and saves included."""

    def __init__(self, logging_config: LoggingConfig, total_steps: int, start_step: int) -> None:
        self._interval = logging_config.log_interval_steps
        self._total = total_steps
        self._timed_from: tuple[int, float] | None = None
        self._weight = 0.0
        self._weighted_loss = 0.0
        self._weighted_seconds = 0.0
        self._val_loss: float | None = None
        self._checkpoint = start_step or None
        self._live = _LiveLine(total_steps, start_step) if logging_config.progress_bar and _can_draw() else None

    def show(self, record: StepRecord, checkpoint: int | None = None) -> None:
        """checkpoint: step of the newest that this session has saved."""
        # The sums start at zero, so their quotients have no start-up bias.
        self._weight = _SMOOTHING * self._weight + 1
        self._weighted_loss = _SMOOTHING * self._weighted_loss + record.loss
        self._weighted_seconds = _SMOOTHING * self._weighted_seconds + 1 / record.tokens_per_s
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        self._checkpoint = checkpoint or self._checkpoint
        text = f"step {record.step}/{self._total}: {', '.join(self._parts(record))}"
        if self._live is not None:
            self._live.show(record.step, text)
        if record.step % self._interval == 0 or record.step == self._total:
            interval_log.info(text)

    def _parts(self, record: StepRecord) -> list[str]:
        tokens_per_s = self._weight / self._weighted_seconds
        parts = [f"loss {self._weighted_loss / self._weight:.3f}"]
        parts += [f"val loss {self._val_loss:.3f}"] if self._val_loss is not None else []
        parts += [f"{tokens_per_s:,.0f} tokens/s"]
        if record.mfu is not None:
            parts += [f"MFU {100 * record.mfu * tokens_per_s / record.tokens_per_s:.1f} %"]
        parts += [f"{record.memory_mb / 1e3:.1f} GB", f"{self._time_left(record.step)} left"]
        parts += [f"checkpoint {self._checkpoint}"] if self._checkpoint is not None else []
        return parts

    def _time_left(self, step: int) -> str:
        """From this session's second step on: the first carries the start-up."""
        if self._timed_from is None:
            self._timed_from = (step, time.monotonic())
            return "?" if step < self._total else "0:00:00"
        first, started = self._timed_from
        seconds = round((time.monotonic() - started) / (step - first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        if self._live is not None:
            self._live.close()


class _LiveLine:
    """The line at the foot of the terminal, drawn anew as steps go by; what is logged meanwhile appears above it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._terminal = sys.stderr
        self._drawn_at = 0.0
        self._rich = _rich_progress()
        self._task = self._rich.add_task(f"step {start_step}/{total_steps}", total=total_steps, completed=start_step)
        self._rich.start()  # sys.stderr is rich's own from here on
        self._rich.console.show_cursor(True)  # a killed run cannot give a hidden one back
        self._handlers = _handlers_to(self._terminal)
        for handler in self._handlers:
            handler.setStream(sys.stderr)
            handler.addFilter(_is_no_interval)

    def show(self, step: int, text: str) -> None:
        self._rich.update(self._task, completed=step, description=text)
        if time.monotonic() - self._drawn_at > _REFRESH_S:
            self._rich.refresh()
            self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Leave the last line as it is."""
        self._rich.stop()
        for handler in self._handlers:
            handler.setStream(self._terminal)
            handler.removeFilter(_is_no_interval)


def _can_draw() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        BarColumn(table_column=Column(width=20)),
        TextColumn("{task.percentage:3.0f}%", table_column=Column(width=4)),
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        console=Console(file=sys.stderr),
        auto_refresh=False,
    )


def _handlers_to(stream: TextIO) -> list[logging.StreamHandler[TextIO]]:
    streams = (handler for handler in log.handlers if isinstance(handler, logging.StreamHandler))
    return [handler for handler in streams if handler.stream is stream]


def _is_no_interval(record: logging.LogRecord) -> bool:
    """The live line says the same."""
    return record.name != interval_log.name
