"""Detect dead, silent or failed ranks: each writes a file in `<work_dir>/.ranks/<start>/` and watches the others'.

torch's collectives say that something took too long, not who was missing, and before the process group exists they say
nothing. Here every rank renews a record once a second: where it runs, its last finished step, what it is doing, and at
the end how it failed. The others wait for rank 0's preparation by it, end when a rank has failed, and name who is
silent. A record is judged by whether it changes (see `rwkv_cluster.runtime.heartbeat`), so that what an earlier run
has left says nothing about this one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rwkv_cluster import errors
from rwkv_cluster.errors import ConfigError, Interrupted, LaunchError, Preempted, RWKVClusterError, TrainingError
from rwkv_cluster.runtime import rank_env
from rwkv_cluster.runtime.exit_report import report_exit
from rwkv_cluster.runtime.heartbeat import (
    BEAT_S,
    Watch,
    every,
    has_died,
    machine,
    read_record,
    start_tick,
    this_process,
    write_record,
)
from rwkv_cluster.runtime.terminal.live_line import clock_time
from rwkv_cluster.train.distributed.collectives import is_collective_failure
from rwkv_cluster.train.distributed.hang_detector import HangDetector
from rwkv_cluster.train.distributed.rank_record import (
    RankRecord,
    describe_dead,
    describe_late,
    describe_silent,
    record_of,
)
from rwkv_cluster.workdir import WorkDir

log = logging.getLogger("rwkv_cluster")

T = TypeVar("T")

SILENT_S = 15.0  # without a heartbeat: rank 0 is given up during preparation, others are reported
FIRST_SIGN_S = 300.0  # for rank 0 to start at all; a first import from a cold network disk takes minutes
FIRST_LOOK_S = 2.0  # for a living rank 0 to show itself, before the disk is asked what it would have said
RECENT_S = 60.0  # a record that is older, by the shared directory's own clock, is of an earlier run
LINGER_S = 8.0  # for ranks that start later to see that rank 0 has failed
GRACE_S = 3.0  # for a rank to end by itself after another's failure, and for torch's own timeout to come first
WORD_S = 30.0  # between two words of a rank that waits for rank 0
GONE_S = 3.0  # without a beat, when a collective has failed already


class RankMonitor:
    """This rank's record and its view of the others'. In a run of one rank it only watches whether that goes on.

    session: what all ranks do together here, and for which time in this process: rank 0's word of another session is
    none for this one. timeout_s: for how long a rank may be silent before the run is given up. hang_timeout_s: for how
    long it may do the same before its stacks are written, see `train.hang_detector`.
    """

    def __init__(
        self, work: WorkDir, world_size: int, timeout_s: float, hang_timeout_s: float, session: str = "train 1"
    ) -> None:
        self.rank = rank_env.rank()
        self.folder = work.ranks / hashlib.sha256(rank_env.launch_id().encode()).hexdigest()[:12]
        self.timeout_s = timeout_s
        self._record = RankRecord(
            **this_process(), id=uuid.uuid4().hex, rank=self.rank, state="running", doing="starting", session=session
        )
        self.interval_s = max(BEAT_S, world_size / 8)  # all ranks read all records: bounded for the file server's sake
        self.others = {rank: Watch(self.path(rank), self.interval_s) for rank in range(world_size) if rank != self.rank}
        self.hang_detector = HangDetector(work.hang / f"rank-{self.rank}.txt", hang_timeout_s)
        self._next_look = 0.0
        self._failed_since: float | None = None
        self._reported: set[int] = set()

    def path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"

    @contextmanager
    def running(self) -> Iterator[RankMonitor]:
        """Show life inside the block and end with the others; say how the block ended."""
        if not self.others:
            with every(BEAT_S, self._look_at_itself):
                yield self
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"work_dir: {error.strerror} at {error.filename}", remedy="Choose one you may write to"
            ) from error
        with every(BEAT_S, self._beat):
            try:
                yield self
            except Preempted:
                self.write(state="ended")
                raise
            except BaseException as error:
                cause = self._explained(error) if is_collective_failure(error) else error
                self.write(state="failed", **_failure(cause))
                self._let_others_see()
                self._let_origin_speak(cause)
                if cause is error:
                    raise
                raise cause from error
            self.write(state="ended")
        self._leave()

    def update(self, **facts: Any) -> None:
        """Change this rank's record; the others see it with the next beat."""
        self._record = replace(self._record, **facts)

    def set_activity(self, doing: str, **facts: Any) -> None:
        """What the main thread does from now on."""
        self.hang_detector.reset(self._record.doing or "")
        self.update(doing=doing, **facts)

    def write(self, **facts: Any) -> None:
        """Change this rank's record at once."""
        self.update(**facts)
        self._write()

    def wait_for_rank_0(
        self, read: Callable[[RankRecord], T | None], *, what: str, is_there: Callable[[], bool]
    ) -> T | None:
        """What rank 0's record says of this session, once it does. Outside any collective, so that it may take hours.

        read: what is waited for, None while the record does not have it.

        is_there: whether the work directory holds `what` already, so that rank 0 would have nothing to add. Rank 0 may
        have ended before this rank looks, or may do something else: None is returned when this is true meanwhile.

        Raises what rank 0 has raised, or LaunchError when rank 0 does not start or no longer updates its heartbeat.
        """
        log.info("rank %d waits for %s on rank 0", self.rank, what)
        watch, started = Watch(self.path(0), BEAT_S / 4), time.monotonic()
        next_word = started + WORD_S
        watch.poll()
        recent = _recent(self.path(0), self.path(self.rank))
        while True:
            record = record_of(watch)
            is_here = watch.alive and record.session == self._record.session
            is_lost = bool(watch.record) and (watch.alive or recent) and watch.still_s >= SILENT_S
            if record.state == "failed" and (watch.alive or is_lost):
                raise _error_of(record)
            if is_here and (value := read(record)) is not None:
                return value
            looked_enough = watch.alive or time.monotonic() - started > FIRST_LOOK_S
            if not is_here and looked_enough and is_there():
                return None
            if is_lost and record.state == "running":
                silent = f"{record.name} has not updated its heartbeat for {SILENT_S:.0f} s"
                raise LaunchError(silent, remedy="See its log", rank=0)
            patience_s = max(FIRST_SIGN_S, self.timeout_s) if watch.alive else FIRST_SIGN_S
            if record.state != "running" and watch.still_s > patience_s:
                late = f"rank 0 has not come to {what} within {patience_s:.0f} s"
                raise LaunchError(late, remedy="See its log", rank=0)
            if time.monotonic() >= next_word:
                next_word += WORD_S
                log.info("rank %d has waited %s for %s", self.rank, clock_time(time.monotonic() - started), what)
            time.sleep(BEAT_S / 4)
            watch.poll()

    def forget_earlier_runs(self) -> None:
        """Remove the records of other starts. For the holder of the work directory."""
        for folder in self.folder.parent.glob("*"):
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _let_others_see(self) -> None:
        """Let rank 0's record change on for a while: a failure that stands still may be one of an earlier run."""
        launches_the_others = not rank_env.launched()
        if self.rank != 0 or self._record.begins is not None or launches_the_others:
            return
        deadline = time.monotonic() + LINGER_S
        while time.monotonic() < deadline:
            if all(watch.alive and record_of(watch).state != "running" for watch in self.others.values()):
                return
            time.sleep(BEAT_S / 4)

    def _let_origin_speak(self, error: BaseException) -> None:
        """Launchers end all ranks when one has ended: the rank whose failure this one repeats goes first."""
        quoted = error.rank if isinstance(error, RWKVClusterError) and error.is_quoted else None
        watch = None if quoted is None else self.others.get(quoted)
        deadline = time.monotonic() + GRACE_S
        while watch is not None and not has_died(watch.record) and time.monotonic() < deadline:
            time.sleep(BEAT_S / 8)
            watch.poll()

    def _beat(self) -> None:
        self.update(beats=self._record.beats + 1)
        self._write()
        self._look_at_itself()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + self.interval_s
            for watch in self.others.values():
                watch.poll()
            self._act()

    def _look_at_itself(self) -> None:
        self.hang_detector.poll(self._record)

    def _write(self) -> None:
        with suppress(OSError):  # a moment's trouble of a network file system; the next beat is a second away
            write_record(self.path(self.rank), self._record.facts())

    def _act(self) -> None:
        """End this process when a rank has failed or is silent for too long, and nothing else has ended it."""
        if self._record.state != "running":
            return
        running = self._living_or_lost()
        for rank, watch in running.items():
            if watch.still_s >= SILENT_S and rank not in self._reported:
                self._reported.add(rank)
                log.warning("%s. Waiting for %.0f s in all", describe_silent(watch), self.timeout_s)
        failed = [record_of(watch) for watch in self.others.values() if _has_failed(watch)]
        died = [watch for watch in self.others.values() if self._has_died(watch)]
        lost = [watch for watch in running.values() if watch.still_s >= max(self.timeout_s, SILENT_S) + GRACE_S]
        if not failed and not died and not lost:
            return
        if self._failed_since is None:
            self._failed_since = time.monotonic()
        if lost or time.monotonic() - self._failed_since >= GRACE_S:
            self._end(_error_of(failed[0]) if failed else _error_about(died, lost))

    def _end(self, error: RWKVClusterError) -> None:
        """End the process from the thread: its main thread hangs in a collective, in the data or while it ends."""
        self.hang_detector.write(self._record)
        self.write(state="failed", **_failure(error))
        log.error("rwkv-cluster: rank %d: error: %s", self.rank, error)
        self._end_frozen_neighbours()
        report_exit(error.exit_code, error)
        os._exit(error.exit_code)

    def _has_died(self, watch: Watch) -> bool:
        """Whether a rank of this machine and start exited without a report: killed, or crashed in native code."""
        record = record_of(watch)
        of_this_start = watch.alive or record.parent == self._record.parent
        if record.state != "running" or not of_this_start or not has_died(watch.record):
            return False
        watch.poll()  # its last word may have come between the two looks
        return record_of(watch).state == "running"

    def _living_or_lost(self) -> dict[int, Watch]:
        """Ranks that have been seen in this run and have not said that they ended."""
        return {r: watch for r, watch in self.others.items() if watch.alive and record_of(watch).state == "running"}

    def _explained(self, error: BaseException) -> RWKVClusterError:
        """Why a collective failed: whom this rank has waited for. Takes a few seconds, in which the others say too."""
        self.write(doing="waiting for the other ranks")
        deadline = time.monotonic() + 2 * self.interval_s + GONE_S
        while True:
            running = list(self._living_or_lost().values())  # before failures: the next beat may find one at any moment
            for watch in self.others.values():
                if _has_failed(watch):
                    return _error_of(record_of(watch))
                if self._has_died(watch):
                    return TrainingError(describe_dead(watch), rank=record_of(watch).rank)
            if time.monotonic() >= deadline or all(map(self._accounted_for, running)):
                break
            time.sleep(BEAT_S / 4)
        self._end_frozen_neighbours()
        who, number = self._who_was_missing(running)
        return TrainingError(f"{who} (torch: {str(error).splitlines()[0][:200]})", rank=number)

    @staticmethod
    def _accounted_for(watch: Watch) -> bool:
        return watch.still_s >= GONE_S or record_of(watch).doing == "waiting for the other ranks"

    def _who_was_missing(self, running: list[Watch]) -> tuple[str, int | None]:
        """Sentence about the ranks that this one has waited for, and the number of the first."""
        silent = [watch for watch in running if watch.still_s >= GONE_S]
        late = [watch for watch in running if not self._accounted_for(watch)]
        if silent or late:
            texts = [*map(describe_silent, silent), *map(describe_late, late)]
            return "; ".join(texts[:4]), record_of((silent + late)[0]).rank
        absent = [rank for rank, watch in self.others.items() if not watch.alive]
        if absent:
            numbers = ", ".join(map(str, absent[:4]))
            return f"rank {numbers} has not started. Look at its log, or raise training.timeout_s", absent[0]
        names = [record_of(watch).name_and_step for watch in running[:4]]
        sentence = (
            f"{' and '.join(names) or 'another rank'} cannot be reached over the network from "
            f"{self._record.host}, although its process lives. Look at the network between these machines"
        )
        return sentence, record_of(running[0]).rank if running else None

    def _end_frozen_neighbours(self) -> None:
        """Kill silent ranks of this machine: launchers only ask a process to end, which a stopped one does not hear."""
        for watch in self._living_or_lost().values():
            record = record_of(watch)
            if record.machine != machine() or record.started is None or record.pid is None:
                continue
            if watch.still_s >= GONE_S and start_tick(record.pid) == record.started:
                # Said first: this rank ends with that one where it is its child.
                log.warning("%s. It is ended", describe_silent(watch))
                with suppress(OSError):
                    os.kill(record.pid, signal.SIGKILL)

    def _leave(self) -> None:
        """Remove the records when every rank has ended; until then rank 0's word is there for those that look later."""
        if all(RankRecord.of(read_record(self.path(rank))).state == "ended" for rank in self.others):
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()


def _has_failed(watch: Watch) -> bool:
    return watch.alive and record_of(watch).state == "failed"


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, RWKVClusterError):
        quotes = error.rank if error.is_quoted else None
        return {"error": type(error).__name__, "message": error.message, "quotes": quotes}
    if isinstance(error, Interrupted):
        return {"error": "Preempted", "message": str(error)}
    return {"error": "TrainingError", "message": f"{type(error).__name__}: {error}"}


def _error_about(died: list[Watch], lost: list[Watch]) -> TrainingError:
    """Error that names ranks that have died and ranks that are silent; one of them at least."""
    texts = [*map(describe_dead, died), *map(describe_silent, lost)]
    return TrainingError("; ".join(texts[:4]), rank=record_of((died + lost)[0]).rank)


def _error_of(record: RankRecord) -> RWKVClusterError:
    """Error that rank `record` has raised, to be raised here too."""
    kind = getattr(errors, str(record.error), TrainingError)
    number = record.rank if record.quotes is None else record.quotes
    return kind(str(record.message), rank=number, is_quoted=True)


def _recent(path: Path, now: Path) -> bool:
    """Whether `path` was written not long before `now`: two times that the same file server gave."""
    try:
        return now.stat().st_mtime - path.stat().st_mtime < RECENT_S
    except OSError:
        return False
