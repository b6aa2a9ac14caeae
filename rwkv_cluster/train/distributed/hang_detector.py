"""A rank that does not go on leaves the stacks of its threads in `logs/hang/rank-<N>.txt`, for people to see why."""

from __future__ import annotations

import faulthandler
import logging
import time
from contextlib import suppress
from pathlib import Path

from rwkv_cluster.runtime.heartbeat import BEAT_S
from rwkv_cluster.runtime.own_file import open_own
from rwkv_cluster.train.distributed.rank_record import RankRecord

log = logging.getLogger("rwkv_cluster")

SLOWER = 3.0  # times the longest wait that has ended, before a wait is called a hang
WATCHED = ("loading data", "computing")  # evaluations, checkpoints and preparations take as long as they take


class HangDetector:
    """Measures how long this rank has done the same, as far as its process was awake.

    path: of the stacks. limit_s: seconds without a finished micro batch after which they are written, once.
    """

    def __init__(self, path: Path, limit_s: float) -> None:
        self.path = path
        self.limit_s = limit_s
        self.still_s = 0.0
        self._longest_s = 0.0
        self._told = False
        self._looked_at = time.monotonic()

    def reset(self, did: str | None) -> None:
        """The main thread has come to something new. did: what it has done until now."""
        if did in WATCHED and not self._told:
            self._longest_s = max(self._longest_s, self.still_s)
        self.still_s, self._told = 0.0, False

    def poll(self, record: RankRecord) -> None:
        """Check once; called about every BEAT_S from another thread. record: this rank's."""
        now = time.monotonic()
        self.still_s += min(now - self._looked_at, 2 * BEAT_S)  # a process that was suspended has not stalled
        self._looked_at = now
        if record.doing in WATCHED and self.still_s >= max(self.limit_s, SLOWER * self._longest_s):
            self.write(record)

    def write(self, record: RankRecord) -> None:
        """Write the stacks, and say so, unless that has been done or the rank has not been still for so long."""
        if self._told or self.still_s < self.limit_s:
            return
        self._told = True
        sentence = f"{record.name_and_step} has not gone on for {self.still_s:.0f} s: it is {record.doing}"
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", opener=open_own) as file:
                file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}: {sentence}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        log.warning("%s. The stacks of its threads are in %s", sentence, self.path)
