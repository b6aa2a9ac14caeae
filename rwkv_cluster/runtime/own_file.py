"""The files that a run has made for itself are regular files: nothing else under their names is opened or waited for.

A work directory may come from somebody else. A link in it would lead what a run writes into another file, and a pipe
would hold up whoever reads it. Folders may be links, to another disk for instance, and so may the inputs.
"""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from rwkv_cluster.errors import ConfigError

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class WrongKindError(ConfigError, OSError):
    """Something else has the name of a run's file or folder. As an OSError it has `strerror` and `filename`."""

    def __init__(self, path: str | Path, mode: int, wanted: str) -> None:
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        super().__init__(f"{path} is {kind}, and a run has {wanted} of that name", remedy="Remove it, or move it away")
        self.args = (path, mode, wanted)  # what a copy is made from
        self.strerror = f"this is {kind}, not {wanted}"
        self.filename = str(path)


def open_own(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Descriptor of a run's own file, as `os.open`; also the `opener` of `open`.

    Raises WrongKindError, without waiting, for anything but a regular file; OSError as `os.open`.
    """
    with suppress(FileNotFoundError):  # a device is not even opened
        require_own(path)
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    mode_found = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode_found):  # put there since the look before
        os.close(descriptor)
        raise WrongKindError(path, mode_found, "a regular file")
    return descriptor


def read_own(path: str | Path) -> bytes:
    """Content of a run's own file. Raises as `open_own`."""
    with open(path, "rb", opener=open_own) as handle:
        return handle.read()


def require_own(path: str | Path) -> None:
    """Raises WrongKindError when `path` is there and no regular file, FileNotFoundError when it is not there."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        raise WrongKindError(path, mode, "a regular file")


def require_folder(path: str | Path, *, may_link: bool = True) -> None:
    """Raises WrongKindError when `path` is there and no folder. may_link: a link to a folder is one too."""
    with suppress(FileNotFoundError):
        mode = os.stat(path, follow_symlinks=may_link).st_mode
        if not stat.S_ISDIR(mode):
            raise WrongKindError(path, mode, "a folder")


def reason(error: OSError) -> str:
    """What the system refuses and where; also whose that is, where somebody else's lacks a permission."""
    text = f"{error.strerror} at {error.filename}"
    if not isinstance(error, PermissionError) or error.filename is None:
        return text
    for place in (Path(error.filename), *Path(error.filename).absolute().parents):
        with suppress(OSError):
            mine = os.stat(place).st_uid == os.geteuid()
            return text if mine else f"{text}; {place} belongs to {owner(place)}"
    return text


def owner(path: str | Path) -> str:
    """Name of the user whom `path` belongs to, or the number of one without a name here. Raises OSError."""
    number = os.stat(path).st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
