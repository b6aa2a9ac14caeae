"""How far long work has come and how much time is left: a live line on a terminal, elsewhere a line now and then.

reading step-00001000: 3.2 of 10.1 GB, 0:00:12 left
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.runtime.terminal.live_line import LiveLine, can_draw, clock_time

log = logging.getLogger("rwkv_cluster")

FIRST_S = 2.0  # work that is done by then says nothing
EVERY_S = 10.0  # between two lines where there is no terminal


class Countdown:
    """A context manager around the work, which calls `advance`. Only rank 0 speaks.

    total: in `unit`, which are `scale` of what `advance` counts; GB are 10^9 bytes.
    """

    def __init__(self, what: str, total: float, unit: str, scale: float = 1.0) -> None:
        self._what, self._total, self._unit, self._scale = what, total, unit, scale
        self._done = 0.0
        self._began = time.monotonic()
        self._next = self._began + FIRST_S
        self._line: LiveLine | None = None

    def __enter__(self) -> Countdown:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.close()

    def advance(self, amount: float) -> None:
        """Count `amount` more as done."""
        self._done += amount
        now = time.monotonic()
        if now < self._next or rank() != 0:
            return
        left = clock_time((now - self._began) / self._done * (self._total - self._done)) if self._done else "?"
        digits = ",.0f" if self._scale == 1 else ".1f"
        done, total = (format(value / self._scale, digits) for value in (self._done, self._total))
        parts = {"done": f"{done} of {total} {self._unit}", "left": f"{left} left"}
        if self._line is None and can_draw():
            self._line = LiveLine(self._what, self._total, self._done, first_to_go=("done", "left"))
        if self._line is not None:
            self._line.show(self._done, f"{self._what}: ", parts)
        else:
            log.info("%s: %s", self._what, ", ".join(parts.values()))
            self._next = now + EVERY_S


def bytes_left(what: str, n_bytes: int) -> Countdown:
    """Progress of work on so many bytes."""
    return Countdown(what, n_bytes, "GB", 1e9) if n_bytes >= 1e9 else Countdown(what, n_bytes, "MB", 1e6)
