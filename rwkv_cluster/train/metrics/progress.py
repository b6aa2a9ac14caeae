"""One line about the run that a person can read: a live one on a terminal, one per interval in the log.

    step 1200/5000: loss 3.512, val loss 3.704, 12,345 tokens/s, MFU 41.2 %, 20.1 GB, 1:23:45 left, checkpoint 1000

The loss is smoothed; tokens/s leave validation, checkpoints and exported weights out; the time left does not.
docs/metrics.md has the formulas.
"""

from __future__ import annotations

import logging
import time

from rwkv_cluster.config import LoggingConfig
from rwkv_cluster.runtime.terminal.live_line import LiveLine, can_draw, clock_time
from rwkv_cluster.train.metrics.metrics_file import StepRecord

interval_log = logging.getLogger("rwkv_cluster.progress")

_SMOOTHING = 0.95
_FIRST_TO_GO = ("memory", "mfu", "checkpoint", "val_loss", "speed", "left", "loss")


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
        self._live: LiveLine | None = None
        if logging_config.progress_bar and can_draw():
            head, quiet = f"step {start_step}/{total_steps}", (interval_log.name,)
            self._live = LiveLine(head, total_steps, start_step, first_to_go=_FIRST_TO_GO, quiet=quiet)

    def show(self, record: StepRecord, checkpoint: int | None = None) -> None:
        """checkpoint: step of the newest that this session has saved."""
        # The sums start at zero, so their quotients have no start-up bias.
        self._weight = _SMOOTHING * self._weight + 1
        self._weighted_loss = _SMOOTHING * self._weighted_loss + record.loss
        self._weighted_seconds = _SMOOTHING * self._weighted_seconds + 1 / record.tokens_per_s
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        self._checkpoint = checkpoint or self._checkpoint
        head, parts = f"step {record.step}/{self._total}: ", self._parts(record)
        text = head + ", ".join(parts.values())
        if self._live is not None:
            self._live.show(record.step, head, parts)
        if record.step % self._interval == 0 or record.step == self._total:
            interval_log.info(text)

    def _parts(self, record: StepRecord) -> dict[str, str]:
        """What there is to say, in order, by the names of `_FIRST_TO_GO`."""
        tokens_per_s = self._weight / self._weighted_seconds
        parts = {"loss": f"loss {self._weighted_loss / self._weight:.3f}"}
        parts |= {"val_loss": f"val loss {self._val_loss:.3f}"} if self._val_loss is not None else {}
        parts |= {"speed": f"{tokens_per_s:,.0f} tokens/s"}
        if record.mfu is not None:
            parts |= {"mfu": f"MFU {100 * record.mfu * tokens_per_s / record.tokens_per_s:.1f} %"}
        parts |= {"memory": f"{record.memory_mb / 1e3:.1f} GB", "left": f"{self._time_left(record.step)} left"}
        parts |= {"checkpoint": f"checkpoint {self._checkpoint}"} if self._checkpoint is not None else {}
        return parts

    def _time_left(self, step: int) -> str:
        """Time left, from this session's second step on: the first carries the start-up."""
        if self._timed_from is None:
            self._timed_from = (step, time.monotonic())
            return "?" if step < self._total else "0:00:00"
        first, started = self._timed_from
        return clock_time((time.monotonic() - started) / (step - first) * (self._total - step))

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
