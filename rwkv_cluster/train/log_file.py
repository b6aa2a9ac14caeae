"""`logs/train.log`: what the package says while a run is held, with the time, for whoever looks later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rwkv_cluster.disk import writing

log = logging.getLogger("rwkv_cluster")


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a disk that refuses a line here refuses the step's record too, which ends the run by a sentence."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append to `path` what is logged during the block, and the error that ends it. Raises CheckpointError."""
    with writing(path, 0):
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "error: %s", (error,), None))
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):  # likewise
            handler.close()
