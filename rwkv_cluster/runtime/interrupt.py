"""Signals that ask a command to end: heard at any moment, answered at once, obeyed within seconds.

Python runs a signal's handler between two steps of its main thread, and the next one may be far away: in a long
operation, or while torch waits for ranks that are missing. So a thread hears every signal too. It says what is going to
happen, and ends the process where the main thread does not.

A command ends at once, by `Interrupted`, unless it says that it comes to an end by itself (`Listener.defer`). A second
Ctrl-C or SIGTERM ends that too. The other signals never count as a second one: Slurm and the agent of a launch repeat
them until the ranks have ended.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from rwkv_cluster.errors import Interrupted
from rwkv_cluster.runtime.rank_env import launched, rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PRESSES = (signal.SIGTERM, signal.SIGINT)
SAME_S = 0.5  # within which two of these are one
SAME_LAUNCHED_S = 5.0  # a terminal reaches every rank, and then its launcher repeats the signal
ANSWER_S = 0.3  # for a command to end before it says that it is going to
GRACE_S = 5.0  # for the main thread to end, with what it has to clean up
_END = 0

log = logging.getLogger("rwkv_cluster")


class Listener:
    """What this process has been asked. reason: name of the first signal. count: of all of them.

    on_end: last words of a process whose main thread does not end, which give its exit code; None: it is left alone.
    """

    def __init__(self, on_end: Callable[[Interrupted], int] | None = None) -> None:
        self.reason: str | None = None
        self.count = 0
        self._on_end = on_end
        self._answer: str | None = None
        self._ignores = False
        self._on_interrupt: Callable[[], None] | None = None
        self._insisted = False
        self._raised = False
        self.is_forking = False
        self._pressed_at: float | None = None
        self._due: list[tuple[float, Callable[[], None]]] = []

    @property
    def ignores(self) -> bool:
        """Whether signals do nothing any more."""
        return self._ignores

    def defer(self, answer: str) -> None:
        """Let a signal change `reason` only from here on. answer: what is going to happen, for who has sent it."""
        self._answer = answer

    def obey(self) -> None:
        """Let a signal end the command at once from here on."""
        self._answer = None

    def ignore(self) -> None:
        """Let a signal do nothing from here on: the command ends, and says itself how."""
        self._ignores = True

    def answer_interrupts(self, action: Callable[[], None] | None) -> None:
        """Let Ctrl-C do `action` in the main thread, and end nothing, from here on. None: let it end the command again.

        For a conversation, in which it stops what is being said; the other signals do what they did.
        """
        self._on_interrupt = action

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread, when that comes to it. Raises Interrupted."""
        if self._ignores:
            return
        if number == signal.SIGINT and self._on_interrupt is not None:
            self._on_interrupt()
            return
        self.reason = self.reason or signal.Signals(number).name
        if self.is_forking:  # raised in a hook of fork it would be lost, and with it the lock that the hook releases
            return
        if not self._raised and (self._insisted or self._answer is None):
            self._raised = True  # what is cleaned up on the way out is left in peace
            raise Interrupted(number, insisted=self._insisted)

    def listen(self, descriptor: int) -> None:
        """Hear signals in a thread of its own, by the bytes that the interpreter writes at once, until `_END`."""
        while True:
            next_due = min((moment for moment, _ in self._due), default=None)
            wait_s = None if next_due is None else max(0.0, next_due - time.monotonic())
            if not select.select([descriptor], [], [], wait_s)[0]:
                now = time.monotonic()
                due = [action for moment, action in self._due if moment <= now]
                self._due = [entry for entry in self._due if entry[0] > now]
                for action in due:
                    action()
                continue
            for number in os.read(descriptor, 512):
                if number == _END:
                    return
                if number in STOP_SIGNALS and not self._ignores:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self._on_interrupt is not None:
            return
        self.count += 1
        self.reason = self.reason or number.name
        again = self._is_second_press(number)
        if again and (self._insisted or self._answer is None):
            self._end(number)
        elif again:
            self._insisted = True
            _say(f"{number.name} once more: ending now")
            self._after(GRACE_S, lambda: self._end(number))
            with suppress(ProcessLookupError):  # once more to the main thread, whose handler may have run before this
                signal.pthread_kill(threading.main_thread().ident or 0, number)
        elif self.count == 1 and self._answer is not None:
            more = ". Press again to end now" if number == signal.SIGINT else ""
            _say(f"{number.name} received: {self._answer}{more}")
        elif self.count == 1:
            self._after(ANSWER_S, lambda: self._remind(number))
            self._after(GRACE_S, lambda: self._end(number))

    def _remind(self, number: signal.Signals) -> None:
        _say(f"{number.name} received: ending")
        if not self._raised:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _is_second_press(self, number: signal.Signals) -> bool:
        if number not in PRESSES:
            return False
        now = time.monotonic()
        if self._pressed_at is None:
            self._pressed_at = now
        return now - self._pressed_at > (SAME_LAUNCHED_S if launched() else SAME_S)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, action))

    def _end(self, number: signal.Signals) -> None:
        """End the process in place of a main thread that does not. Files are renamed into place: none is cut."""
        if self._on_end is not None and not self._ignores:
            os._exit(self._on_end(Interrupted(number, insisted=self._insisted)))


_active: Listener | None = None


@functools.cache
def _watch_forks() -> None:
    """Tell the listener while this process forks. The hooks are called around those of what was imported before."""

    def tell(is_forking: bool) -> None:
        if _active is not None:
            _active.is_forking = is_forking

    after = functools.partial(tell, False)
    os.register_at_fork(before=functools.partial(tell, True), after_in_parent=after, after_in_child=after)


@contextmanager
def listening(on_end: Callable[[Interrupted], int] | None = None) -> Iterator[Listener]:
    """Signals are heard inside the block; the handlers from before come back after it. Inside another, that one's.

    on_end: see `Listener`. In another thread than the main one, where Python allows no handlers, nothing is heard.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Listener()
        return
    listener = _active = Listener(on_end)
    _watch_forks()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=listener.listen, args=(reader,), name="signals", daemon=True)
    thread.start()
    before: dict[int, Any] = {}
    try:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                before[number] = signal.signal(number, listener.on_signal)
        yield listener
    finally:
        _active = None
        signal.set_wakeup_fd(descriptor_before)
        for changed, handler in before.items():
            # The interpreter takes handlers of Python back before it ends, and a signal that is repeated would kill it.
            signal.signal(changed, signal.SIG_IGN if listener.ignores else handler)
        os.write(writer, bytes([_END]))
        thread.join()
        os.close(writer)
        os.close(reader)


def leave_to_parent() -> None:
    """Leave signals to the parent of a forked process, which ends with it: only SIGTERM ends it before.

    Ctrl-C and a closed terminal reach the whole group of processes.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _say(text: str) -> None:
    log.warning("rank %d: %s", rank(), text) if launched() else log.warning(text)
