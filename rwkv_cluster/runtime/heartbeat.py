"""Signs of life on a shared directory: a process rewrites a small file every second, and others see that it changes.

Clocks of two machines are never compared. A watcher counts by its own clock how long it has seen the same content.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_cluster.runtime.own_file import open_own, read_own

BEAT_S = 1.0
TEXT_LIMIT = 500  # characters of a text in a record
_RECORD_BYTES = 4096  # written in place and in one piece: that needs no free block, so a full disk stops no heartbeat


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Replace the content of `path` by `facts`, as JSON. Raises OSError."""
    text = json.dumps({key: _short(value) for key, value in facts.items()}, ensure_ascii=False)
    descriptor = open_own(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.encode(errors="backslashreplace").ljust(_RECORD_BYTES), 0)
    finally:
        os.close(descriptor)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` has written; empty where there is no file or no whole record."""
    return _parse(_read(path))


def this_process() -> dict[str, Any]:
    """What finds this process again: host, kernel, container, process id, the kernel's tick at which it started; and
    which process started it."""
    pid, parent = os.getpid(), os.getppid()
    here = {"host": socket.gethostname(), "machine": machine(), "container": _container()}
    return {**here, "pid": pid, "started": start_tick(pid), "parent": f"{parent} {start_tick(parent)}"}


def has_died(record: Mapping[str, Any]) -> bool:
    """Whether the process of a record is gone. False where the kernel here cannot say: elsewhere, or not recorded."""
    if record.get("started") is None or (record.get("machine"), record.get("container")) != (machine(), _container()):
        return False
    return start_tick(record["pid"]) != record["started"]


def machine() -> str:
    """The running kernel, as no other has it: the same in each container of a machine, another after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def start_tick(pid: int) -> str | None:
    """When process `pid` of this machine started, which tells it from a later one of that number; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]  # Z: dead, and its parent has not looked yet


def _container() -> str:
    """The set of process ids that this process sees and that mean nothing in another container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@contextmanager
def every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` now, and from a thread of its own every `seconds` while the block runs."""
    end = threading.Event()

    def repeat() -> None:
        while not end.wait(seconds):
            action()

    action()
    thread = threading.Thread(target=repeat, name=f"every {seconds:g} s", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(5 * BEAT_S)  # a file system that hangs does not hold up the end


class Watch:
    """What one process's record says, and for how long it has not changed.

    record: as last read. still_s: seconds without a change, as far as this watcher was awake and could read.
    alive: whether it has changed since the first look, so that a living process must have written it.
    """

    def __init__(self, path: Path, interval_s: float = BEAT_S) -> None:
        self.path = path
        self.record: dict[str, Any] = {}
        self.still_s = 0.0
        self.alive = False
        self._interval_s = interval_s
        self._content: bytes | None = None
        self._looked_at = 0.0

    def poll(self) -> None:
        """Read once. To be called about every `interval_s`."""
        content, now = _read(self.path), time.monotonic()
        if content == self._content:
            # a watcher that was itself suspended, or hung in the file system, has not watched for all that time
            self.still_s += min(now - self._looked_at, 2 * self._interval_s)
        else:
            self.alive = self._content is not None and bool(content)
            self.record, self.still_s = _parse(content), 0.0
        self._content, self._looked_at = content, now


def _read(path: Path) -> bytes:
    try:
        return read_own(path)
    except OSError:
        return b""


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _short(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= TEXT_LIMIT else value[: TEXT_LIMIT - 3] + "..."
