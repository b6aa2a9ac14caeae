"""One process at a time in a directory, on one machine and on several that share it.

Within a machine the kernel's flock decides, and drops with the process. Not every shared file system carries it to
the other machines, so the holder also renews a heartbeat in the lock file: who finds the record of a holder on another
machine watches it, and takes over only when it has not changed for a minute.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.errors import Interrupted, LaunchError, Preempted
from rwkv_cluster.runtime.heartbeat import BEAT_S, Watch, every, machine, read_record, this_process, write_record
from rwkv_cluster.runtime.own_file import WrongKindError, open_own
from rwkv_cluster.runtime.rank_env import slurm_job

TAKEOVER_S = 60.0
CHECK_S = 3.0
STARTUP_S = 3.0  # for a lock that is taken to have a record that says by whom
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

log = logging.getLogger("rwkv_cluster")


@contextmanager
def acquire(path: Path, what: str) -> Iterator[None]:
    """Hold `path`, the lock of `what`, for this process.

    Raises LaunchError, naming the holder, while it lives: at once on the same machine, within seconds on another.
    Raises OSError where `path` cannot be made.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        kernel_decides = _flock(descriptor, fcntl.LOCK_EX, path, what)
        if not _is_free(read_record(path), kernel_decides):
            _wait_until_gone(path, what)
        claim = _LockRecord(path, what)
        try:
            with every(BEAT_S, claim.renew):
                try:
                    yield
                finally:
                    claim.released = True
        except (Preempted, Interrupted):  # an end in order, after which another machine may go on at once
            claim.clear()
            raise
        claim.clear()
    finally:
        os.close(descriptor)


def require_free(path: Path, what: str) -> None:
    """Raises LaunchError while a living process holds `path`: an early look, `acquire` is the real check."""
    try:
        descriptor = open_own(path, os.O_RDONLY)
    except WrongKindError:
        raise
    except OSError:
        return
    try:
        kernel_decides = _flock(descriptor, fcntl.LOCK_SH, path, what)
    finally:
        os.close(descriptor)
    if not _is_free(read_record(path), kernel_decides):
        _refuse_if_alive(path, what, CHECK_S)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its record says. alive: by the kernel or a heartbeat; False for one that ended by force, or
    on another machine has not updated its heartbeat for `CHECK_S`. Names are None where the record has none."""

    alive: bool
    host: str | None
    pid: int | None
    job: str | None
    since: str | None

    def __str__(self) -> str:
        return _holder({name: value for name, value in vars(self).items() if value is not None}).removeprefix("by ")


def holder(path: Path) -> Holder | None:
    """Who holds `path`, or died holding it; None where it is free. Takes up to `CHECK_S`, and changes nothing."""
    try:
        require_free(path, "it")
        alive = False
    except LaunchError:
        alive = True
    record = read_record(path)
    if not alive and _is_released(record):
        return None
    return Holder(alive, *(record.get(name) for name in ("host", "pid", "job", "since")))


def _flock(descriptor: int, kind: int, path: Path, what: str) -> bool:
    """Take the kernel's lock; False where the file system has none. Raises LaunchError when another holds it."""
    deadline = time.monotonic() + STARTUP_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            time.sleep(0.2)  # the file may still name the holder before: a new one writes just after it has locked
            record = read_record(path)
            if _is_released(record) and time.monotonic() < deadline:
                continue  # somebody only looks whether it is free, or is about to write
            raise LaunchError(_in_use({} if _is_released(record) else record, what)) from error
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return False
        return True


def _is_free(record: dict[str, Any], kernel_decides: bool) -> bool:
    """Whether the record needs no watching: released, or left by a process of this machine that the kernel knows dead.

    A record without a machine is damaged, or older than heartbeats.
    """
    return _is_released(record) or (kernel_decides and record.get("machine") in (None, machine()))


def _is_released(record: dict[str, Any]) -> bool:
    return not record or "released" in record


def _refuse_if_alive(path: Path, what: str, patience_s: float) -> dict[str, Any]:
    """Watch the holder's heartbeat until it has been still for `patience_s`. Raises LaunchError when it beats."""
    watch = Watch(path)
    watch.poll()
    while watch.record and watch.still_s < patience_s:
        time.sleep(BEAT_S / 4)
        watch.poll()
        if watch.alive and watch.record:
            raise LaunchError(_in_use(watch.record, what))
    return watch.record


def _wait_until_gone(path: Path, what: str) -> None:
    holder = _holder(read_record(path))
    log.info("%s was last held %s. Watching for %.0f s whether that process lives", what, holder, TAKEOVER_S)
    if _refuse_if_alive(path, what, TAKEOVER_S):
        log.warning("%s is taken over: it was held %s, which no longer updates its heartbeat", what, holder)


class _LockRecord:
    """This process's record in the lock file."""

    def __init__(self, path: Path, what: str) -> None:
        self.released = False
        self._path = path
        self._what = what
        self._beats = 0
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._record = {**this_process(), "claim": uuid.uuid4().hex, "job": slurm_job(), "since": since}

    def renew(self) -> None:
        """Show that this process lives. Ends it when another has taken over in the meantime."""
        record = read_record(self._path)
        if self._beats and not self.released and record.get("claim", self._record["claim"]) != self._record["claim"]:
            self._give_way(record)
        self._beats += 1
        try:
            write_record(self._path, {**self._record, "beats": self._beats})
        except OSError:  # a moment's trouble of a network file system; the next beat is a second away
            log.debug("the heartbeat in %s could not be written", self._path, exc_info=True)

    def clear(self) -> None:
        """Let the next holder start at once, wherever it is. The names stay, for who comes in this very moment."""
        if read_record(self._path).get("claim") == self._record["claim"]:
            write_record(self._path, {**self._record, "released": True})

    def _give_way(self, record: dict[str, Any]) -> None:
        """Exit at once: another process took the lock. An exception would not stop background writers."""
        log.error(
            "error: %s. This process was held up for so long that it counted as gone", _in_use(record, self._what)
        )
        os._exit(LaunchError.exit_code)


def _in_use(record: dict[str, Any], what: str) -> str:
    look = f"Look at it with `squeue -j {record['job']}`, wait" if record.get("job") else "Wait"
    return f"{what} is in use {_holder(record)}. {look} for it, end it, or choose another work_dir"


def _holder(record: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= record.keys():
        return "by another process"
    job = f" in Slurm job {record['job']}" if record.get("job") else ""
    return f"by process {record['pid']} on {record['host']}{job} since {record['since']}"
