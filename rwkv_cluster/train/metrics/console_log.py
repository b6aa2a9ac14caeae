"""`logs/train.log`: what the package says while a run trains, with the time, for whoever looks later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from rwkv_cluster.errors import Interrupted
from rwkv_cluster.runtime.own_file import open_own
from rwkv_cluster.runtime.terminal.text_safety import VisibleFormatter

log = logging.getLogger("rwkv_cluster")


class _LogFile(logging.FileHandler):
    """A disk that refuses a line here refuses the step's record too, which ends the run by a sentence."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=open_own)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def log_file(path: Path | None) -> Iterator[None]:
    """Append to `path` what is logged during the block, and the error that ends it. None: nothing, as ranks but 0.

    The file appears with the first line: a run that is refused before it says anything leaves no trace.
    """
    if path is None:
        yield
        return
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(VisibleFormatter("%(asctime)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    try:
        yield
    except (Exception, Interrupted) as error:
        if handler.stream is not None:
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "error: %s", (error,), None))
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):
            handler.close()
