"""Are the token files still those that were prepared? Their bytes are compared with the manifest's sha256.

At every start a few blocks of each file are read, so that it costs the same for any size. Every byte is read at the
first start on a machine, after a change of a file's size, times or inode, and where a block does not fit.
`verified.json` beside the manifest remembers which machine has read which content, and a checksum of each block.
That file is a cache: without it everything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_cluster.data.manifest import DataManifest, is_windows
from rwkv_cluster.errors import DataError
from rwkv_cluster.runtime.heartbeat import machine
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.workdir import HUB_TOKENIZER, VOCABULARY, atomic_write

CACHE_NAME = "verified.json"
BLOCK_BYTES = 4 << 20
SAMPLED_BLOCKS = 16
_MOST_MACHINES = 64
_LISTED_RANGES = 3


@dataclass(frozen=True)
class _Known:
    """A content that was read whole. blocks: CRC-32 of each block. machines: what the file's `_stat` was on each."""

    sha256: str
    blocks: list[int]
    machines: dict[str, list[int]]


class _Content(NamedTuple):
    n_bytes: int
    sha256: str
    blocks: list[int]


class DamagedFileError(DataError):
    """A file is not what was prepared. fault: the message without what to do about it. own: we made the file."""

    def __init__(self, fault: str, remedy: str, *, own: bool) -> None:
        super().__init__(f"{fault}. {remedy}")
        self.fault = fault
        self.own = own


def check_files(manifest: DataManifest, out_dir: Path, names: Iterable[str]) -> None:
    """Compare files of a prepared directory with its manifest; blocks of those that this machine has read whole.

    Raises DamagedFileError naming the file and, as far as that is known, where in it the damage is.
    """
    cache, here, changed = _read_cache(out_dir), machine(), False
    for name in names:
        path, sha256 = manifest.path_of(out_dir, name), manifest.files[name].sha256
        known = _known(cache, name, sha256)
        with _faults(manifest, name):
            stat = _stat(path)
            if known.machines.get(here) == stat and _sample_fits(path, stat[0], known.blocks):
                continue
            content = _require_same(path, known)
            unchanged = _stat(path) == stat
        if unchanged:
            machines = {key: value for key, value in known.machines.items() if key != here} | {here: stat}
            cache[name] = _Known(sha256, content.blocks, dict(list(machines.items())[-_MOST_MACHINES:]))
            changed = True
    if changed:
        with suppress(OSError):  # a directory that cannot be written is read whole again the next time
            records = {name: asdict(known) for name, known in cache.items() if name in manifest.files}
            atomic_write(out_dir / CACHE_NAME, json.dumps(records).encode())


def check_every_byte(manifest: DataManifest, out_dir: Path) -> None:
    """Read all of every file that the manifest lists. Writes nothing; raises DamagedFileError as `check_files`."""
    cache = _read_cache(out_dir)
    for name, record in manifest.files.items():
        with _faults(manifest, name):
            _require_same(manifest.path_of(out_dir, name), _known(cache, name, record.sha256))


class _Fault(Exception):
    """What is wrong with a file, before it is known what to do about it."""


@contextmanager
def _faults(manifest: DataManifest, name: str) -> Iterator[None]:
    """What is found wrong with file `name` becomes a DamagedFileError."""
    own = "in_place" not in manifest.options or name in (VOCABULARY, HUB_TOKENIZER) or is_windows(name)
    remedy = (
        "Make it again from its input with `rwkv-cluster prepare CONFIG`"
        if own
        else "Put back a good copy of it, or use it as it is in a new work_dir"
    )
    try:
        yield
    except _Fault as fault:
        raise DamagedFileError(str(fault), remedy, own=own) from None
    except OSError as error:
        raise DamagedFileError(f"{error.filename or name} cannot be read: {error.strerror}", remedy, own=own) from error


def _known(cache: Mapping[str, _Known], name: str, sha256: str) -> _Known:
    """What is known of this content; of another nothing."""
    known = cache.get(name)
    return known if known is not None and known.sha256 == sha256 else _Known(sha256, [], {})


def _stat(path: Path) -> list[int]:
    """What changes when a file is written to, or another takes its name."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_cache(out_dir: Path) -> dict[str, _Known]:
    path = out_dir / CACHE_NAME
    try:
        return {str(name): _Known(**entry) for name, entry in json.loads(read_own(path)).items() if _is_known(entry)}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}


def _is_known(entry: Any) -> bool:
    kinds = {"sha256": str, "blocks": list, "machines": dict}
    return (
        isinstance(entry, dict)
        and entry.keys() == kinds.keys()
        and all(isinstance(entry[key], kind) for key, kind in kinds.items())
    )


def _sample_fits(path: Path, size: int, blocks: list[int]) -> bool:
    """Whether a few blocks, other ones at each call, are as they were."""
    if len(blocks) != -(-size // BLOCK_BYTES):
        return False
    numbers = random.SystemRandom().sample(range(len(blocks)), min(SAMPLED_BLOCKS, len(blocks)))
    buffer = memoryview(bytearray(min(BLOCK_BYTES, size)))
    with open(path, "rb", buffering=0) as handle:
        return all(
            zlib.crc32(buffer[: _fill(handle.fileno(), buffer, number * BLOCK_BYTES)]) == blocks[number]
            for number in sorted(numbers)
        )


def _read_whole(path: Path) -> _Content:
    digest, blocks, n_bytes = hashlib.sha256(), [], 0
    total = path.stat().st_size
    with open(path, "rb", buffering=0) as handle, bytes_left(f"verifying {path.name}", total) as left:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(total, 1))))
        while size := _fill(handle.fileno(), buffer, n_bytes):
            block = buffer[:size]
            digest.update(block)
            blocks.append(zlib.crc32(block))
            n_bytes += size
            left.advance(size)
    return _Content(n_bytes, digest.hexdigest(), blocks)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read a block, whole but at the end of the file; the number of bytes."""
    size = 0
    while size < len(buffer) and (n_read := os.preadv(descriptor, [buffer[size:]], offset + size)):
        size += n_read
    return size


def _require_same(path: Path, known: _Known) -> _Content:
    """Read a file whole. Raises _Fault where its content is not the known one."""
    content = _read_whole(path)
    if content.sha256 == known.sha256:
        return content
    blocks = zip(known.blocks, content.blocks, strict=False)
    bad = [number * BLOCK_BYTES for number, (old, new) in enumerate(blocks) if old != new]
    ends = [min(start + BLOCK_BYTES, content.n_bytes) - 1 for start in bad]
    listed = [f"{start:,} to {end:,}" for start, end in zip(bad[:_LISTED_RANGES], ends, strict=False)]
    more = f" and {len(bad) - _LISTED_RANGES:,} more blocks" if len(bad) > _LISTED_RANGES else ""
    place = f", in bytes {', '.join(listed)}{more}" if bad else ""
    digests = f"sha256 {content.sha256[:12]}..., expected {known.sha256[:12]}..."
    raise _Fault(f"{path} is damaged: it is not what was prepared{place} ({digests})")
