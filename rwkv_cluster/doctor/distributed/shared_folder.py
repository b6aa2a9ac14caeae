"""Whether all ranks see one directory: what rank 0 writes there by lock and rename, and a lock that it holds."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rwkv_cluster.doctor.distributed.merge import Report, who
from rwkv_cluster.doctor.distributed.rank_store import Meeting
from rwkv_cluster.doctor.results import Row, note, ok, problem
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.preflight import write_facts
from rwkv_cluster.workdir import TEMPORARY_PREFIX

SEEN_S = 20.0  # for a network file system to show what another node wrote; some keep old listings for seconds
FILE, LOCK = "written", "held"


def shared_directory(
    meeting: Meeting, folder: Path, present: Sequence[int], reports: Mapping[int, Report]
) -> list[Row]:
    """Rows on rank 0. folder: of the run, where rank 0 makes a temporary one that is gone afterwards."""
    if meeting.rank != 0:
        offered = meeting.tell("shared")
        meeting.gather("looked", _look(Path(offered)) if offered else None, present)
        return []
    with ExitStack() as stack:
        offered = None
        with suppress(OSError):  # `storage` has a row that says why
            offered = _offer(folder, stack)
        meeting.tell("shared", offered)
        looked = meeting.gather("looked", None, present)
    return _judged(folder, {rank: found for rank, found in looked.items() if found}, reports)


def _offer(folder: Path, stack: ExitStack) -> str:
    """A folder with a file that was renamed into it and one that is locked, until `stack` closes. Raises OSError."""
    temporary = tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}doctor-", dir=folder, ignore_cleanup_errors=True)
    scratch = Path(stack.enter_context(temporary))
    descriptor = os.open(scratch / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    write_facts(scratch / FILE, {})
    return str(scratch)


def _look(folder: Path) -> dict[str, Any]:
    """How long it took to see the file, None for never; and whether the lock of another node counts here."""
    began = time.monotonic()
    while not (folder / FILE).exists():
        if time.monotonic() - began > SEEN_S:
            return {"seen_s": None, "lock_counts": None}
        if folder.parent.is_dir():
            os.listdir(folder.parent)  # makes a network file system look again
        time.sleep(0.05)
    seen_s = time.monotonic() - began
    try:
        with open(folder / LOCK) as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return {"seen_s": seen_s, "lock_counts": True}
    except OSError:
        pass
    return {"seen_s": seen_s, "lock_counts": False}


def _judged(folder: Path, looked: Mapping[int, dict[str, Any]], reports: Mapping[int, Report]) -> list[Row]:
    if not looked:
        return []
    blind = [rank for rank, found in looked.items() if found["seen_s"] is None]
    if blind:
        text = f"{who(blind, reports)} does not see in {folder} what rank 0 writes there"
        remedy = "Set work_dir to a directory that all nodes share, mounted at the same path"
        return [problem("shared directory", text, remedy, LaunchError)]
    slowest_s = max(found["seen_s"] for found in looked.values())
    rows = [ok("shared directory", f"all ranks see within {slowest_s:.1f} s what rank 0 renames into {folder}")]
    without = [rank for rank, found in looked.items() if not found["lock_counts"]]
    if without:
        text = f"rank 0's lock does not count for {who(without, reports)}: "
        text += "the heartbeat in the work directory's lock tells runs of each other instead, which takes seconds"
        return [*rows, note("shared locks", text)]
    return [*rows, ok("shared locks", "rank 0's lock counts for all ranks")]
