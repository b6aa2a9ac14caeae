"""Requests from outside to end a run: signals and a STOP file. They set a flag; the step loop acts on it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pytorch_lightning import Trainer

from rwkv_cluster.errors import Preempted
from rwkv_cluster.ranks import launched

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first reason to stop. Further signals change nothing, also while a checkpoint is written."""

    def __init__(self, stop_file: Path) -> None:
        self.reason: str | None = None
        self._stop_file = stop_file

    def requested(self) -> bool:
        if self.reason is None and self._stop_file.exists():
            self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Signals set the flag inside the block; the handlers from before it come back after it.

        Not after a Preempted under a launcher: it sends SIGTERM to the other ranks as soon as the first one has ended,
        and they must still say why they end, with their own exit code.
        """
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield self
        except Preempted:
            if launched():
                before.clear()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def keep_lightning_out(trainer: Trainer) -> None:
    """Leave the signals to `StopRequest`.

    Lightning's handler of SIGTERM ends the run in silence with code 1 and without a checkpoint, also when it was
    there only while the trainer started, and its broadcast from inside the handler can hang the ranks.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
