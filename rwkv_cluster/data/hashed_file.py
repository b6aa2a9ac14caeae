"""A file that knows its own size and sha256 when it is closed, so that nothing is read back to be checksummed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple


class FileDigest(NamedTuple):
    """Size in bytes and hexadecimal sha256 of a finished file."""

    bytes: int
    sha256: str


class HashedFile:
    """New binary file at `path`, which must not exist. Leaving the `with` block without an exception fsyncs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = open(path, "xb", buffering=0)  # noqa: SIM115 -- closed by __exit__
        self._sha256 = hashlib.sha256()
        self._n_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        """Append `content`, all of it."""
        view = memoryview(content).cast("B")
        self._sha256.update(view)
        self._n_bytes += len(view)
        while len(view):
            view = view[self._handle.write(view) :]

    @property
    def digest(self) -> FileDigest:
        return FileDigest(self._n_bytes, self._sha256.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            os.fsync(self._handle.fileno())
        self._handle.close()
