"""One line about the run that a person can read: a bar on a terminal, a log line per interval elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.train.records import StepRecord

log = logging.getLogger("rwkv_cluster")

_SMOOTHING = 0.95


class Progress:
    """Shows each step's record, with the time left to the run's true last step, evaluations and saves included."""

    def __init__(self, logging_config: LoggingConfig, total_steps: int, start_step: int) -> None:
        self._interval = logging_config.log_interval_steps
        self._total = total_steps
        self._start_step = start_step
        self._started = time.monotonic()
        self._weight = 0.0
        self._weighted_loss = 0.0
        self._val_loss: float | None = None
        self._bar: tqdm | None = None
        if logging_config.progress_bar and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def show(self, record: StepRecord) -> None:
        # Both sums start at zero, so their quotient has no start-up bias.
        self._weight = _SMOOTHING * self._weight + 1
        self._weighted_loss = _SMOOTHING * self._weighted_loss + record.loss
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        text = f"loss {self._weighted_loss / self._weight:.3f}, {record.tokens_per_s:,.0f} tokens/s"
        if self._val_loss is not None:
            text += f", val loss {self._val_loss:.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif record.step % self._interval == 0 or record.step == self._total:
            log.info(
                "step %d/%d: %s, lr %.2e, %s",
                record.step,
                self._total,
                text,
                record.lr,
                self._time_left(record),
            )

    def _time_left(self, record: StepRecord) -> str:
        per_step = (time.monotonic() - self._started) / (record.step - self._start_step)
        seconds = round(per_step * (self._total - record.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
