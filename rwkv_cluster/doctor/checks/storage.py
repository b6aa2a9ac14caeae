"""The folder of a run: how fast it writes, whether locks and renames do what the run counts on, and its clock."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok, problem, refused, warning
from rwkv_cluster.errors import CheckpointError, ConfigError, LaunchError
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.workdir import TEMPORARY_PREFIX, WorkDir, atomic_write

BLOCK_BYTES = 4 * 2**20
MOST_BLOCKS = 8
LONG_ENOUGH_S = 0.5  # for writing; a slow disk is not asked for more
SLOW_MB_PER_S = 20.0
SKEW_S = 5.0
NO_LOCKS = "Set work_dir to a file system with locks (NFS: not mounted with `nolock`; Lustre: with `flock`)"


def storage(context: CheckContext) -> list[Row]:
    """What a temporary folder in the run's folder shows; nothing of it stays."""
    folder = context.folder
    if context.config is not None and (file := _in_the_way(WorkDir(context.config.work_dir).root)):
        return [problem("disk", f"{file} is not a directory", "Choose another work_dir", ConfigError)]
    usage = shutil.disk_usage(folder)
    free = ok("free space", f"{usage.free / 1e9:,.1f} GB of {usage.total / 1e9:,.1f} on {folder}")
    try:
        with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}doctor-", dir=folder) as scratch:
            return [
                free,
                _speed(Path(scratch), folder),
                _locks(Path(scratch)),
                _renames(Path(scratch)),
                _clock(Path(scratch)),
            ]
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}"
        if context.config is None:
            return [free, note("disk", text, "Name a CONFIG to have its work directory examined")]
        return [free, problem("disk", text, "Choose a work_dir that you may write to", ConfigError)]
    except CheckpointError as error:
        return [free, refused("disk", error) if context.config else note("disk", f"{error}")]


def _in_the_way(root: Path) -> Path | None:
    """What stands, as a file, where `root` or a folder above it would have to be."""
    nearest = next(path for path in (root, *root.parents) if os.path.lexists(path))
    return None if os.path.isdir(nearest) else nearest


def _speed(scratch: Path, folder: Path) -> Row:
    """Blocks of random bytes, each on the disk before the next, for half a second; then read past the cache."""
    path, block = scratch / "speed", os.urandom(BLOCK_BYTES)
    began, n_bytes = time.perf_counter(), 0
    with writing(path, MOST_BLOCKS * BLOCK_BYTES), open(path, "wb", buffering=0) as file:
        while n_bytes < MOST_BLOCKS * BLOCK_BYTES and time.perf_counter() - began < LONG_ENOUGH_S:
            n_bytes += file.write(block)
            os.fsync(file.fileno())
    write_mb_per_s = n_bytes / 1e6 / (time.perf_counter() - began)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, n_bytes = time.perf_counter(), 0
        while (data := file.read(BLOCK_BYTES)) and time.perf_counter() - began < LONG_ENOUGH_S:
            n_bytes += len(data)
    read_mb_per_s = n_bytes / 1e6 / (time.perf_counter() - began)
    text = f"writes {write_mb_per_s:,.0f} MB/s with fsync, reads {read_mb_per_s:,.0f} MB/s, in {folder}"
    if write_mb_per_s < SLOW_MB_PER_S:
        remedy = "Use a faster disk for work_dir, or save less often (checkpoint.save_interval_s)"
        return warning("disk", f"{text}: checkpoints will take long", remedy, figure=write_mb_per_s)
    return ok("disk", text, figure=write_mb_per_s)


def _locks(scratch: Path) -> Row:
    """Whether the kernel refuses a second lock, as a second run in the work directory must be."""
    with open(scratch / "lock", "w") as first, open(scratch / "lock") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ok("locks", "a second lock is refused")
        except OSError as error:
            text = f"this file system has none ({error.strerror}): a heartbeat tells runs of each other instead"
            return warning("locks", text, NO_LOCKS)
    text = "a file can be locked twice there: two runs would not notice each other"
    return problem("locks", text, NO_LOCKS, LaunchError)


def _renames(scratch: Path) -> Row:
    """Whether a file is replaced whole, and is durable, as checkpoints are."""
    path = scratch / "renamed"
    try:
        atomic_write(path, b"first")
        atomic_write(path, b"second")
        if path.read_bytes() == b"second":
            return ok("renames", "a file is replaced whole")
        text = "a file that was replaced still has its first content"
    except OSError as error:
        text = f"a file cannot be replaced there: {error.strerror}"
    return problem("renames", text, "Set work_dir to a file system that renames over a file and syncs", LaunchError)


def _clock(scratch: Path) -> Row:
    """This machine's time beside that of the file system, which is the file server's where there is one."""
    path = scratch / "clock"
    before = time.time()
    path.touch()
    skew_s = path.stat().st_mtime - (before + time.time()) / 2
    if abs(skew_s) > SKEW_S:
        text = f"the files' clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
        return warning("clock", f"{text}: times in logs do not fit together", "Synchronise it with chrony or ntpd")
    return ok("clock", "that of the files is this machine's")
