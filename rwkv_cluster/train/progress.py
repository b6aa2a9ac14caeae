"""One line about the run that a person can read: a bar on a terminal, a log line per interval elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time

from tqdm import tqdm

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.train.records import StepRecord

log = logging.getLogger("rwkv_cluster")

_SMOOTHING = 0.95
_BAR = "{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt}{postfix}"


class Progress:
    """Shows each step's record, with the time left to the run's true last step, evaluations and saves included."""

    def __init__(self, logging_config: LoggingConfig, total_steps: int, start_step: int) -> None:
        self._interval = logging_config.log_interval_steps
        self._total = total_steps
        self._timed_from: tuple[int, float] | None = None
        self._weight = 0.0
        self._weighted_loss = 0.0
        self._weighted_seconds = 0.0
        self._val_loss: float | None = None
        self._bar: tqdm | None = None
        if logging_config.progress_bar and sys.stderr.isatty():
            size = os.get_terminal_size(sys.stderr.fileno())  # 0 x 0 where nobody has told the terminal its size
            columns, lines = size.columns or 100, size.lines or 24
            self._bar = tqdm(total=total_steps, initial=start_step, bar_format=_BAR, ncols=columns, nrows=lines)

    def show(self, record: StepRecord) -> None:
        # The sums start at zero, so their quotients have no start-up bias.
        self._weight = _SMOOTHING * self._weight + 1
        self._weighted_loss = _SMOOTHING * self._weighted_loss + record.loss
        self._weighted_seconds = _SMOOTHING * self._weighted_seconds + 1 / record.tokens_per_s
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        parts = [f"loss {self._weighted_loss / self._weight:.3f}"]
        if self._val_loss is not None:
            parts.append(f"val loss {self._val_loss:.3f}")
        parts += [f"{self._weight / self._weighted_seconds:,.0f} tokens/s", f"{self._time_left(record.step)} left"]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(1)
        elif record.step % self._interval == 0 or record.step == self._total:
            log.info("step %d/%d: %s", record.step, self._total, ", ".join(parts))

    def _time_left(self, step: int) -> str:
        """From this session's second step on: the first carries the start-up."""
        if self._timed_from is None:
            self._timed_from = (step, time.monotonic())
            return "?" if step < self._total else "0:00:00"
        first, started = self._timed_from
        seconds = round((time.monotonic() - started) / (step - first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
