"""How prepared files come to be in their directory: whole, one writer at a time, the manifest last."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_cluster.data.manifest import CACHE_NAME, DataManifest
from rwkv_cluster.errors import DataError
from rwkv_cluster.runtime.heartbeat import read_record
from rwkv_cluster.runtime.own_file import open_own
from rwkv_cluster.workdir import DATA_MANIFEST, PREPARE_LOCK, TEMPORARY_PREFIX, atomic_write, fsync_directory

log = logging.getLogger("rwkv_cluster")

PROGRESS_NAME = "progress"  # in the folder of unfinished files: what is being done, see `heartbeat.write_record`
WORD_S = 30.0  # between two words of who waits for a preparation
_LOCK_TIMEOUT_S = 24 * 3600.0


def commit(out_dir: Path, manifest: DataManifest, finished: Path, stale: Iterable[str]) -> None:
    """Put finished files in place. Between the first and the last step the directory is not a prepared one."""
    for name in (DATA_MANIFEST, CACHE_NAME):
        (out_dir / name).unlink(missing_ok=True)
    fsync_directory(out_dir)
    for name in stale:
        (out_dir / name).unlink(missing_ok=True)
    for path in sorted(finished.iterdir()):
        os.replace(path, out_dir / path.name)
    fsync_directory(out_dir)
    atomic_write(out_dir / DATA_MANIFEST, manifest.to_json())


@contextmanager
def temporary_folder(directory: Path) -> Iterator[Path]:
    """A folder for unfinished files, removed at the end; what a kill leaves is removed by the next preparation."""
    folder = directory / f"{TEMPORARY_PREFIX}prepare-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def progress(directory: Path) -> dict[str, Any] | None:
    """How far a preparation has come: what it does, tokens so far, in total if known, per second. None: there is none.

    After a kill this is stale; whether it still runs, the lock of the work directory tells.
    """
    folders = [folder for folder in directory.glob(f"{TEMPORARY_PREFIX}prepare-*") if folder.is_dir()]
    return read_record(folders[-1] / PROGRESS_NAME) if folders else None


def in_words(progress: Mapping[str, Any]) -> str:
    """How far a preparation has come, from what `progress` returns."""
    if not {"what", "n_tokens"} <= progress.keys():
        return "begun"
    total = f" of {progress['total']:,}" if progress.get("total") else ""
    return f"{progress['what']}, {progress['n_tokens']:,}{total} tokens"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """One preparation in a directory at a time; the others wait. The kernel drops the lock with the process."""
    descriptor = open_own(directory / PREPARE_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    began = time.monotonic()
    deadline, next_word = began + _LOCK_TIMEOUT_S, began
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"another process has been preparing data in {directory} for a day", remedy="End it"
                    ) from None
                if time.monotonic() >= next_word:
                    how = in_words(progress(directory) or {})
                    log.info("waiting for another process that prepares data in %s: %s", directory, how)
                    next_word = time.monotonic() + WORD_S
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raise DataError for an OSError in this block: a full disk or a missing permission is no bug."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DataError):
            raise
        free = shutil.disk_usage(directory).free // 2**20 if directory.exists() else 0
        raise DataError(
            f"data cannot be prepared in {directory}: {error.strerror or error} (at {error.filename or 'a file'}; "
            f"{free} MiB are free there)"
        ) from error
