"""Requests from outside to end a run: signals and a STOP file. They set a flag; the step loop acts on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning import Trainer

from rwkv_cluster.errors import Preempted
from rwkv_cluster.runtime.interrupt import Listener, listening
from rwkv_cluster.runtime.rank_env import launched


class StopRequest:
    """Remembers the first reason to stop. Before the steps and after them a signal ends the run at once instead."""

    def __init__(self, stop_file: Path) -> None:
        self.reason: str | None = None
        self._stop_file = stop_file
        self._listener = Listener()

    def requested(self) -> bool:
        if self.reason is None:
            self.reason = self._listener.reason
        if self.reason is None and self._stop_file.exists():
            self.reason = f"the file {self._stop_file}"
        return self.reason is not None

    def begin_steps(self) -> None:
        """Let signals set the flag from here on: the ranks have met, and end together after a step."""
        self._listener.defer("stopping after this step, with a checkpoint")

    def end_steps(self) -> None:
        """Let a signal end the run at once from here on: all is saved."""
        self._listener.obey()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Signals are heard inside the block; the handlers from before come back after it.

        Not after a Preempted under a launcher: it sends SIGTERM to the other ranks as soon as the first one has ended,
        and they must still say why they end, with their own exit code.
        """
        with listening() as self._listener:
            try:
                yield self
            except Preempted:
                if launched():
                    self._listener.ignore()
                raise


def disable_lightning_signal_handlers(trainer: Trainer) -> None:
    """Leave the signals to `StopRequest`.

    Lightning's handler of SIGTERM ends the run in silence with code 1 and without a checkpoint, also when it was
    there only while the trainer started, and its broadcast from inside the handler can hang the ranks. It also
    asks all ranks before each micro batch whether one has had that signal, for which a GPU's host waits.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
