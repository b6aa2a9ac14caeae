"""Turn an OSError of a write into an error that names path, bytes needed, bytes free and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.errors import CheckpointError

_REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room in your quota, or have it raised,",
    errno.EFBIG: "Raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "Make it writable",
    errno.EACCES: "Make it writable",
    errno.EPERM: "Make it writable",
}


@dataclass(frozen=True)
class WriteFailure:
    """Why something could not be written. number: the system's errno; None where the disk is not to blame."""

    reason: str
    number: int | None

    @classmethod
    def of(cls, error: BaseException) -> WriteFailure:
        """The OSError behind `error`: torch.save hides it in a RuntimeError about its zip format."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            return cls(str(error), None)
        return cls(os.strerror(cause.errno), cause.errno)

    def sentence(self, path: Path, n_bytes: int) -> str:
        """Error text about `path`, a file or folder of about `n_bytes`."""
        if self.number is None:
            return f"{path} cannot be written: {self.reason}"
        folder = existing_parent(path)
        return (
            f"{path} cannot be written: {self.reason}. It needs about {n_bytes:,} bytes and {free_bytes(folder):,} are "
            f"free on {folder}. {_REMEDIES.get(self.number, 'Look at that disk')} and run the same command again"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(folder for folder in path.parents if folder.is_dir())


def free_bytes(folder: Path) -> int:
    """What this user may still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


@contextmanager
def writing(path: Path, n_bytes: int) -> Iterator[None]:
    """Raises CheckpointError with the sentence where the disk refuses the `n_bytes` that the block writes to `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        refusal = WriteFailure.of(error)
        if refusal.number is None:
            raise
        raise CheckpointError(refusal.sentence(path, n_bytes)) from error
