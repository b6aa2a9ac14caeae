"""Requests from outside to end a run: signals and a STOP file. They set a flag; the step loop acts on it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

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

    def install(self) -> None:
        """Take the stop signals over. Lightning installs handlers of its own as it starts: call again after that."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Signals set the flag inside the block; the handlers from before it come back after it."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)
