"""What the library says and what a command results in, written to the person who has started it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_cluster.errors import RWKVClusterError
from rwkv_cluster.runtime.terminal.text_safety import VisibleFormatter

_LOGGER = logging.getLogger("rwkv_cluster")


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write the library's log messages to stderr during the block, from INFO on. Nothing where there is no stderr."""
    if sys.stderr is None:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    level = _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


@contextmanager
def log_to_stderr_by_default() -> Iterator[None]:
    """`log_to_stderr` unless somebody has set up logging, of this library or as a whole: then theirs decides."""
    if _LOGGER.handlers or _LOGGER.level != logging.NOTSET or logging.root.handlers:
        yield
        return
    with log_to_stderr():
        yield


def print_result(text: str, end: str = "\n") -> None:
    """Write to stdout. Raises BrokenPipeError where nobody reads it, RWKVClusterError where it is refused otherwise."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RWKVClusterError(
            f"the work is done, but its result cannot be written to stdout: {error.strerror}",
            remedy="Run the same command again with stdout where there is room",
        ) from error
