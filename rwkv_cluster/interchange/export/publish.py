"""Files of an export given their names: compared with what is there, written whole or not at all, with checksums.

Every file is a function that writes its bytes in order, the same bytes each time: to the disk, or to a digest where
something of that name exists.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.interchange.export.safetensors_writer import INDEX, Sink, is_shard_name
from rwkv_cluster.runtime.disk_errors import existing_parent, free_bytes, writing
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.workdir import TEMPORARY_PREFIX, atomic_writer, fsync_directory, sha256_file

_SPARE = 1.02  # a file system's own blocks

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """One file of an export.

    Attributes:
        name: in the folder; "" where the export is this one file.
        n_bytes: how many, approximately for a .pth.
        write: gives them to a sink.
    """

    name: str
    n_bytes: int
    write: Callable[[Sink], None]


class DigestingSink:
    """A sink that keeps the sha256 of what goes through it, to a file or nowhere. advance: told of each piece."""

    def __init__(self, advance: Advance, handle: IO[bytes] | None = None) -> None:
        self._advance = advance
        self._handle = handle
        self._hash = hashlib.sha256()

    def write(self, content: bytes | memoryview, /) -> int:
        """Write `content`; returns its length."""
        self._hash.update(content)
        if self._handle is not None:
            self._handle.write(content)
        self._advance(len(content))
        return len(content)

    def flush(self) -> None:
        """Nothing: whoever has opened the file does that."""

    def hexdigest(self) -> str:
        """sha256 of all so far."""
        return self._hash.hexdigest()


def files_of(path: Path) -> dict[str, Path]:
    """Files of what is at `path` by their name in it, "" for a file alone."""
    if path.is_dir():
        return {each.name: each for each in path.iterdir()}
    return {"": path} if path.exists() else {}


def same_files(path: Path, parts: Sequence[Part]) -> dict[str, str] | None:
    """sha256 by name where exactly these files are there already, None where nothing is.

    Raises ConfigError, which says what would be replaced, where something else has the name.
    """
    if not os.path.lexists(path):
        return None
    _require_replaceable(path, parts)
    existing = files_of(path)
    different = sorted(existing.keys() ^ {part.name for part in parts})
    digests = {} if different else _compared(path, existing, parts)
    if len(digests) == len(parts):
        return digests
    n_bytes = sum(each.stat().st_size for each in existing.values())
    what = "it" if existing.keys() == {""} else f"its {len(existing)} files"
    raise ConfigError(
        f"{path} exists with another content: {what}, {n_bytes:,} bytes, would be replaced",
        remedy="Name another --output, or replace it with --force",
    )


def _compared(path: Path, existing: Mapping[str, Path], parts: Sequence[Part]) -> dict[str, str]:
    """sha256 of the files that are the same, by name, up to the first that is another; the smallest come first."""
    digests: dict[str, str] = {}
    with bytes_left(f"comparing with {path.name}", 2 * sum(part.n_bytes for part in parts)) as left:
        for part in sorted(parts, key=lambda part: part.n_bytes):
            sink = DigestingSink(left.advance)
            part.write(sink)
            if sha256_file(existing[part.name], left.advance) != sink.hexdigest():
                break
            digests[part.name] = sink.hexdigest()
    return digests


def _require_replaceable(path: Path, parts: Sequence[Part]) -> None:
    """Raise ConfigError where something that is no such export has the name."""
    is_file_alone = parts[0].name == ""
    if path.is_symlink() or not (path.is_file() if is_file_alone else path.is_dir()):
        kind = "file" if is_file_alone else "folder"
        raise ConfigError(f"{path} exists and is no {kind} that an export writes", remedy="Name another --output")
    own = {"", INDEX, *(part.name for part in parts)}
    for name, each in sorted(files_of(path).items()):
        if not each.is_file() or not (name in own or is_shard_name(name)):
            raise ConfigError(f"{path} holds {name}, which is no file of an export", remedy="Name another --output")


def publish(path: Path, parts: Sequence[Part]) -> dict[str, str]:
    """Write the parts, give them their name, in place of what had it, and return their sha256 by name.

    Raises ConfigError where what has the name is no export, CheckpointError where the disk refuses.
    """
    if os.path.lexists(path):
        _require_replaceable(path, parts)
    n_bytes = sum(part.n_bytes for part in parts)
    needed, folder = int(n_bytes * _SPARE), existing_parent(path)
    if (free := free_bytes(folder)) < needed:
        raise CheckpointError(
            f"there is no room for {path}: it needs {needed:,} bytes and {free:,} are free on {folder}",
            remedy="Make room there, or name an --output elsewhere, and run the same command again",
        )
    with writing(path, n_bytes), bytes_left(f"writing {path.name}", n_bytes) as left:
        path.parent.mkdir(parents=True, exist_ok=True)
        if parts[0].name:
            with _atomic_folder(path) as temporary:
                digests = {part.name: _write_file(part, temporary / part.name, left.advance) for part in parts}
        else:
            with atomic_writer(path) as handle, _in_use(handle.fileno()):
                sink = DigestingSink(left.advance, handle)
                parts[0].write(sink)
            digests = {"": sink.hexdigest()}
    _remove_abandoned(path)
    return digests


def _write_file(part: Part, path: Path, advance: Advance) -> str:
    """Write one file durably; returns its sha256."""
    with open(path, "xb") as handle:
        sink = DigestingSink(advance, handle)
        part.write(sink)
        handle.flush()
        os.fsync(handle.fileno())
    return sink.hexdigest()


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """Folder that takes the name `path`, in place of what has it, only when the block ends without an exception."""
    temporary, old = (path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}") for _ in range(2))
    temporary.mkdir()
    try:
        with _opened(temporary) as descriptor, _in_use(descriptor):
            yield temporary
            fsync_directory(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Descriptor of a file or folder for reading."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _in_use(descriptor: int) -> Iterator[None]:
    """Hold a lock that the system gives back when this process ends; none where the file system has no locks."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield


def _remove_abandoned(path: Path) -> None:
    """Delete what killed exports to `path` have left beside it: temporary files and folders that nobody has locked."""
    for entry in path.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(path.name)}-" + "[0-9a-f]" * 8):
        with suppress(OSError), _opened(entry) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
