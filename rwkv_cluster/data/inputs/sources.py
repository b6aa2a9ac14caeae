"""Files that the entries of `data.inputs` stand for, in an order that no locale or file system changes.

An entry is, in this order of precedence:

- `stdlib:`: the `.py` files of the running Python's standard library, without its tests, IDLE, lib2to3 and installed
  packages. Files that are empty or not UTF-8 are left out.
- an existing file;
- an existing folder: its files, and those of its subfolders, whose name matches `file_pattern`, sorted by path;
  names that begin with a dot are left out. Links to folders are followed, into each folder once: the folders that are
  really there come first, then links in the order of their paths;
- the prefix of an existing `.bin`/`.idx` pair;
- a glob pattern: the files it matches, sorted. `**` crosses folders, as if the folder it begins in were named.

What this package has written into work directories and prepared directories is left out of folders and globs.

A file's kind follows from its name, after a final `.gz` or `.zst`: `.npy` array, `.jsonl`, `.ndjson` and `.json`: one
JSON object a line, `.bin` or `.idx` a token file, anything else one text document. A name that promises another format,
such as `.csv`, is refused when the data is prepared.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import zstandard

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import bin_path, idx_path
from rwkv_cluster.data.inputs import own_outputs
from rwkv_cluster.data.inputs.refused_formats import HEAD_BYTES, refuse_format
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.runtime.terminal.time_left import bytes_left

Kind = Literal["array", "jsonl", "text", "tokens"]

STDLIB = "stdlib:"
_STDLIB_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Kind] = {
    ".npy": "array",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".bin": "tokens",
    ".idx": "tokens",
}
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_ZSTD_INPUT = 4096  # zstd expands a block 30,000 times at most, so this bounds what one call can return
_READ = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file to read. For kind "tokens", `path` is the pair's prefix. `optional`: left out when it is not UTF-8."""

    path: Path
    kind: Kind
    compression: str = ""
    optional: bool = False

    def files(self) -> list[Path]:
        """The files whose content decides what this source holds."""
        return [bin_path(self.path), idx_path(self.path)] if self.kind == "tokens" else [self.path]


def find_sources(data: DataConfig, left_out: list[Path] | None = None) -> list[Source]:
    """Every file that `data.inputs` names, in order. Raises DataError naming the entry that leads nowhere.

    left_out: gets the files that were left out because this package wrote them.
    """
    sources = []
    for entry in data.inputs:
        paths = _expand(entry, data.file_pattern, [] if left_out is None else left_out)
        if not paths:
            raise MissingDataError(
                f"data.inputs: '{entry}' has no file that matches data.file_pattern '{data.file_pattern}'",
                remedy="Change the entry or the pattern",
            )
        sources += paths
    return sources


def _expand(entry: str, pattern: str, left_out: list[Path]) -> list[Source]:
    if entry.startswith(STDLIB):
        return _stdlib_sources(entry, pattern)
    if not entry or "\0" in entry:
        raise DataError(f"data.inputs: {entry!r} is not a path", remedy="Name a file, a folder or a pattern")
    path = Path(entry).expanduser()
    if path.is_dir():
        return _sources(own_outputs.without(_walk(path, pattern), path, left_out))
    if path.exists():
        return [source_at(path)]
    if bin_path(path).exists() or idx_path(path).exists():
        return [_token_source(path)]
    if matches := _glob(path):
        return _sources(own_outputs.without(sorted(matches, key=os.fsencode), _fixed_part(path), left_out))
    raise MissingDataError(
        f"data.inputs: '{entry}' does not exist (looked for a file, a folder, a .bin/.idx pair and a pattern, from "
        f"{Path.cwd()})",
        remedy="Correct the entry",
    )


def _walk(folder: Path, pattern: str) -> list[Path]:
    seen: set[tuple[int, int]] = set()
    files: list[Path] = []
    starts = [folder]
    while starts:
        links = []
        for start in starts:
            for root, folders, names in os.walk(start, onerror=_fail):
                identity = _identity(root)
                if start is not folder and identity in seen:
                    folders.clear()
                    continue
                seen.add(identity)
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [path for name in folders if (path := Path(root, name)).is_symlink()]
                files += _matching(root, names, pattern)
        starts = sorted(links, key=os.fsencode)
    return _by_path(files, folder)


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _fail(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}") from error


def _matching(root: str, names: list[str], pattern: str) -> list[Path]:
    return [Path(root, name) for name in names if not name.startswith(".") and fnmatchcase(name, pattern)]


def _by_path(files: list[Path], folder: Path) -> list[Path]:
    return sorted(files, key=lambda path: os.fsencode(path.relative_to(folder)).split(b"/"))


def _glob(pattern: Path) -> list[Path]:
    """The files that match. `**` is walked as a folder is: `glob` would follow links around in circles."""
    if "**" not in pattern.parts:
        return [path for match in glob.glob(str(pattern)) if not (path := Path(match)).is_dir()]
    folder = _fixed_part(pattern)
    parts = pattern.parts[len(folder.parts) :]
    files = _walk(folder, "*") if folder.is_dir() else []
    return [file for file in files if _matches(file.relative_to(folder).parts, parts)]


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _fixed_part(pattern: Path) -> Path:
    """The folder that a glob pattern begins in."""
    return next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))


def _stdlib_sources(entry: str, pattern: str) -> list[Source]:
    if entry != STDLIB:
        raise DataError(
            f"data.inputs: '{entry}' is not known", remedy="Use 'stdlib:' alone, and data.file_pattern to choose files"
        )
    folder = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if _is_of_stdlib(name)]
        files += [file for file in _matching(root, names, pattern) if file.suffix == ".py"]
    return [Source(file, "text", optional=True) for file in _by_path(files, folder)]


def _is_of_stdlib(folder: str) -> bool:
    return not folder.startswith((".", "config-")) and folder not in _STDLIB_LEFT_OUT


def source_at(path: Path) -> Source:
    """The source in one file, by its name. Raises DataError for what is missing or not a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise MissingDataError(f"{path} does not exist", remedy="Correct the path") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a regular file", remedy="Name files, folders or patterns in data.inputs")
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    inner = path.with_suffix("") if compression else path
    kind = _KINDS.get(inner.suffix.lower(), "text")
    if kind != "tokens":
        return Source(path, kind, compression)
    if compression:
        raise DataError(f"{path}: a compressed token file cannot be read", remedy="Decompress it")
    return _token_source(path.with_suffix(""))


def _token_source(prefix: Path) -> Source:
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise MissingDataError(
                f"{path} does not exist", remedy=f"A token file is a pair {prefix.name}.bin and {prefix.name}.idx"
            )
    return Source(prefix, "tokens")


def _sources(files: list[Path]) -> list[Source]:
    """A pair of a token file is met twice, by its `.bin` and by its `.idx`, and is one source."""
    return list(dict.fromkeys(source_at(file) for file in files))


def read_blocks(source: Source, digest: Any = None) -> Iterator[bytes]:
    """Decompressed content of a file in blocks. `digest` (a hashlib object) is fed the file's own bytes.

    Raises DataError naming the file when it cannot be read, or when compressed data is damaged or ends too early.
    """
    try:
        with open(source.path, "rb", buffering=0) as handle:
            raw = iter(lambda: handle.read(_READ), b"")
            hashed = raw if digest is None else _feeding(raw, digest)
            yield from _DECOMPRESSORS[source.compression](hashed)
    except _DecompressionError as error:
        _refuse_other_format(source)
        raise DataError(f"{source.path}: {error}", remedy="Make the file again") from error
    except OSError as error:
        raise DataError(f"{source.path}: {error.strerror or error}") from error


def _refuse_other_format(source: Source) -> None:
    """Raises DataError where what is not compressed as its name says shows that it is something else."""
    with open(source.path, "rb") as handle:
        head = handle.read(HEAD_BYTES)
    if not head.startswith(_MAGIC[source.compression]):
        refuse_format(source.path, head, source.kind)


class _DecompressionError(Exception):
    """What is wrong with compressed data; `read_blocks` adds the file."""


def _feeding(blocks: Iterator[bytes], digest: Any) -> Iterator[bytes]:
    for block in blocks:
        digest.update(block)
        yield block


def _gunzip(blocks: Iterator[bytes]) -> Iterator[bytes]:
    stream, inside = zlib.decompressobj(zlib.MAX_WBITS | 16), False
    for block in blocks:
        while block:
            inside = True
            try:
                content = stream.decompress(block, _READ)
            except zlib.error as error:
                raise _DecompressionError(f"is not valid gzip data ({error})") from error
            if content:
                yield content
            block = stream.unconsumed_tail
            if stream.eof:  # a further member, or the zero padding that tape tools add, may follow
                block = stream.unused_data.lstrip(b"\0")
                stream, inside = zlib.decompressobj(zlib.MAX_WBITS | 16), False
    while inside and not stream.eof and (content := stream.decompress(b"", _READ)):
        yield content
    if inside and not stream.eof:
        raise _DecompressionError("the gzip data ends too early: the file is truncated")


def _unzstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    stream, inside = zstandard.ZstdDecompressor().decompressobj(), False
    for block in blocks:
        for start in range(0, len(block), _ZSTD_INPUT):
            piece = block[start : start + _ZSTD_INPUT]
            while piece:
                inside = True
                try:
                    content = stream.decompress(piece)
                except zstandard.ZstdError as error:
                    raise _DecompressionError(f"is not valid zstd data ({error})") from error
                if content:
                    yield content
                piece = b""
                if stream.eof:
                    piece = stream.unused_data
                    stream, inside = zstandard.ZstdDecompressor().decompressobj(), False
    if inside:
        raise _DecompressionError("the zstd data ends too early: the file is truncated")


_DECOMPRESSORS: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    "": iter,
    "gzip": _gunzip,
    "zstd": _unzstd,
}


def content_digest(source: Source) -> str:
    """sha256 of the source's own files, back to back."""
    digest = hashlib.sha256()
    with bytes_left(f"reading {source.path.name}", sum(path.stat().st_size for path in source.files())) as left:
        for path in source.files():
            for block in read_blocks(Source(path, "text"), digest):
                left.advance(len(block))
    return digest.hexdigest()
