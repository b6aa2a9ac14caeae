"""Encoding in worker processes, with results in the order of the tasks: the output does not depend on their number.

Workers are forked, so a tokenizer of any class is there without being pickled. They end with the process that
started them, also when that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from rwkv_cluster.errors import DataError
from rwkv_cluster.runtime.interrupt import leave_to_parent
from rwkv_cluster.runtime.rank_env import die_with_parent


@dataclass(frozen=True)
class EncodedHere:
    """A task that the caller does itself when its turn comes."""

    payload: Any


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(encode: Callable[[Any], Any], tasks: Iterable[Any], processes: int) -> Iterator[Any]:
    """`encode(task)` for each task, in order, computed by `processes` processes (1: in this one). An EncodedHere comes
    back as it is. Only a few tasks are in flight, so memory stays small. An exception comes where the result would.
    """
    if processes < 2:
        for task in tasks:
            yield task if isinstance(task, EncodedHere) else encode(task)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encode, os.getpid()),
    )
    pending: deque[Future[Any] | EncodedHere] = deque()
    try:
        for task in tasks:
            pending.append(task if isinstance(task, EncodedHere) else pool.submit(_run, task))
            while len(pending) > 2 * processes or isinstance(pending[0], EncodedHere):
                yield _result(pending.popleft())
                if not pending:
                    break
        while pending:
            yield _result(pending.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(entry: Future[Any] | EncodedHere) -> Any:
    if isinstance(entry, EncodedHere):
        return entry
    try:
        return entry.result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenizer process was killed, most likely for lack of memory",
            remedy="Give the job more memory or set data.num_workers to a smaller number",
        ) from None


_encode: Callable[[Any], Any] | None = None  # in a worker process: what to do with a task


def _start_worker(encode: Callable[[Any], Any], parent: int) -> None:
    global _encode
    leave_to_parent()
    die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _encode = encode


def _run(task: Any) -> Any:
    assert _encode is not None
    return _encode(task)
