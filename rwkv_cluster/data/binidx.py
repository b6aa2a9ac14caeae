"""The indexed token file of RWKV-LM and Megatron: `<prefix>.bin` and `<prefix>.idx`, all little-endian.

`.bin` holds the tokens of all items back to back, without a header. `.idx` (RWKV-LM `src/binidx.py`):

    offset    bytes  content
    0         9      "MMIDIDX" and two zero bytes
    9         8      uint64 version = 1
    17        1      uint8 dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 and 7 f64, 8 u16
    18        8      uint64 S, number of items
    26        8      uint64 D, number of doc_idx entries
    34        4 S    int32 sizes, in tokens
    34 + 4 S  8 S    int64 pointers: byte offset of each item in .bin (exclusive prefix sum)
    34 + 12 S 8 D    int64 doc_idx: 0, then the number of items after each document

A file that is opened here has been checked whole, in constant memory and before anything is mapped: a wrong count
can cause neither a large allocation nor a SIGBUS. What this package writes has one item per document.
"""

from __future__ import annotations

import os
import stat
import struct
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rwkv_cluster.data.hashed_file import FileDigest, HashedFile
from rwkv_cluster.data.inputs.refused_formats import HEAD_BYTES, refuse_format
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.workdir import TEMPORARY_PREFIX, fsync_directory

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f8", "<u2"), 1)}
MAX_ITEM_TOKENS = 2**31 - 1  # sizes are int32
_BLOCK_ITEMS = 1 << 18


def bin_path(prefix: str | Path) -> Path:
    """`<prefix>.bin`. The suffix is appended: a prefix may contain dots."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


def dtype_code(dtype: np.dtype) -> int:
    """Code of `dtype` in an index. Raises DataError for a dtype that the format does not know."""
    for code, known in DTYPES.items():
        if known == dtype.newbyteorder("<"):
            return code
    raise DataError(f"tokens of dtype {dtype} cannot be stored", remedy="Use uint16 or int32")


def index_bytes(
    sizes: Sequence[int] | np.ndarray, dtype: Any, doc_idx: Sequence[int] | np.ndarray | None = None
) -> bytes:
    """The `.idx` of items of `sizes` tokens. doc_idx defaults to one item per document."""
    lengths = np.asarray(sizes, np.int64)
    if lengths.size and (lengths.min() < 0 or lengths.max() > MAX_ITEM_TOKENS):
        raise DataError(f"item sizes must be between 0 and {MAX_ITEM_TOKENS} tokens")
    documents = np.arange(len(lengths) + 1) if doc_idx is None else np.asarray(doc_idx, np.int64)
    blocks = _index_blocks(lambda: [lengths], len(lengths), np.dtype(dtype), len(documents), [documents])
    return b"".join(blocks)


def _index_blocks(
    size_blocks: Callable[[], Iterable[np.ndarray]],
    n_items: int,
    dtype: np.dtype,
    n_doc_idx: int,
    doc_idx_blocks: Iterable[np.ndarray],
) -> Iterator[bytes]:
    yield HEADER.pack(MAGIC, 1, dtype_code(dtype), n_items, n_doc_idx)
    for sizes in size_blocks():
        yield sizes.astype("<i4").tobytes()
    position = 0
    for sizes in size_blocks():
        ends = position + np.cumsum(sizes, dtype=np.int64) * dtype.itemsize
        yield (ends - sizes * np.int64(dtype.itemsize)).astype("<i8").tobytes()
        position = int(ends[-1]) if len(ends) else position
    for block in doc_idx_blocks:
        yield block.astype("<i8").tobytes()


def _regular_file_size(path: Path, partner: str) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise MissingDataError(f"{path}: {error.strerror}", remedy=partner) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file", remedy=partner)
    return status.st_size


class IndexedTokens:
    """A checked token file, read only.

    tokens: 1-D memory map of all tokens. sizes: [S] int32. pointers: [S] int64, bytes. doc_idx: [D] int64.
    vocab_size: what every id that is read is below; None: nobody looks. Pickles as vocab_size and its prefix, made
    absolute: whoever unpickles it opens the file anew.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        pair = "A token file is a pair <prefix>.bin and <prefix>.idx; name it by its prefix"
        bin_size = _regular_file_size(bin_path(prefix), pair)
        idx_size = _regular_file_size(idx_path(prefix), pair)
        with open(idx_path(prefix), "rb", buffering=0) as handle:
            self.dtype, n_items, n_doc_idx = _read_header(handle.fileno(), idx_path(prefix), idx_size)
            _check_items(handle.fileno(), self, n_items, bin_size)
            _check_documents(handle.fileno(), idx_path(prefix), n_items, n_doc_idx)
        self._descriptor = os.open(bin_path(prefix), os.O_RDONLY | os.O_CLOEXEC)
        self._close_file = weakref.finalize(self, os.close, self._descriptor)
        self.n_tokens = bin_size // self.dtype.itemsize
        after_sizes = HEADER.size + 4 * n_items
        self.tokens = _map(bin_path(prefix), self.dtype, self.n_tokens, 0)
        self.sizes = _map(idx_path(prefix), np.dtype("<i4"), n_items, HEADER.size)
        self.pointers = _map(idx_path(prefix), np.dtype("<i8"), n_items, after_sizes)
        self.doc_idx = _map(idx_path(prefix), np.dtype("<i8"), n_doc_idx, after_sizes + 8 * n_items)

    def __reduce__(self) -> tuple[type[IndexedTokens], tuple[Path, int | None]]:
        return IndexedTokens, (self.prefix.absolute(), self.vocab_size)

    def __enter__(self) -> IndexedTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, as often as you like; arrays taken from it stay valid. Reading then raises ValueError."""
        self._close_file()
        for name in ("tokens", "sizes", "pointers", "doc_idx"):
            self.__dict__.pop(name, None)

    def _require_open(self) -> None:
        if not self._close_file.alive:
            raise ValueError(f"{bin_path(self.prefix)} is closed. Open it again")

    def __len__(self) -> int:
        self._require_open()
        return len(self.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        """Tokens of item `item`, a copy."""
        self._require_open()
        start = int(self.pointers[item]) // self.dtype.itemsize
        return self.read(start, start + int(self.sizes[item]))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a copy, read without the map: a file that has shrunk is a DataError, not a SIGBUS.

        Raises DataError naming document and position of an id outside the vocabulary, which a GPU would not survive.
        """
        tokens = self._read(start, stop)
        if not self._are_ids(tokens):
            raise self._outside_vocabulary(tokens, start)
        return tokens

    def read_rows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """[len(starts), length] tokens, each row what `read` gives. Ids are looked at once for all, in microseconds."""
        rows = np.stack([self._read(start, start + length) for start in starts])
        if not self._are_ids(rows):
            for start, row in zip(starts, rows, strict=True):
                if not self._are_ids(row):
                    raise self._outside_vocabulary(row, start)
        return rows

    def read_pieces(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of several stretches back to back, each what `read` gives. Ids are looked at once for all."""
        pieces = [self._read(start, start + n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        tokens = np.concatenate(pieces)
        if not self._are_ids(tokens):
            for start, piece in zip(starts.tolist(), pieces, strict=True):
                if not self._are_ids(piece):
                    raise self._outside_vocabulary(piece, start)
        return tokens

    def _read(self, start: int, stop: int) -> np.ndarray:
        self._require_open()
        n_bytes = (stop - start) * self.dtype.itemsize
        content = _read_exactly(self._descriptor, n_bytes, start * self.dtype.itemsize)
        if len(content) != n_bytes:
            raise DataError(
                f"{bin_path(self.prefix)} has become shorter while it was in use", remedy="Prepare the data again"
            )
        return np.frombuffer(content, self.dtype)

    def _are_ids(self, tokens: np.ndarray) -> bool:
        if self.vocab_size is None or tokens.size == 0:
            return True
        return bool(tokens.max() < self.vocab_size) and (self.dtype.kind == "u" or bool(tokens.min() >= 0))

    def _outside_vocabulary(self, tokens: np.ndarray, start: int) -> DataError:
        assert self.vocab_size is not None
        index = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
        position = start + index
        item = int(np.searchsorted(self.pointers, position * self.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(self.doc_idx, item, side="right")) - 1
        first = int(self.pointers[int(self.doc_idx[document])]) // self.dtype.itemsize
        return DataError(
            f"{bin_path(self.prefix)}: document {document}, token {position - first}: id {tokens[index]} is not in the "
            f"tokenizer's vocabulary, 0 to {self.vocab_size - 1}",
            remedy="Use the tokenizer that made it, or make it again",
        )


def open_tokens(prefix: str | Path, vocab_size: int | None = None) -> IndexedTokens:
    """Open `<prefix>.bin` and `.idx` after checking both. Raises DataError saying what is wrong and where.

    vocab_size: what ids are to be below when they are read.
    """
    return IndexedTokens(prefix, vocab_size)


def _map(path: Path, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


def _read_exactly(descriptor: int, n_bytes: int, offset: int) -> bytes:
    pieces = []
    while n_bytes > 0 and (piece := os.pread(descriptor, min(n_bytes, 1 << 30), offset)):
        pieces.append(piece)
        n_bytes -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_array(descriptor: int, path: Path, dtype: str, count: int, offset: int) -> np.ndarray:
    content = _read_exactly(descriptor, count * np.dtype(dtype).itemsize, offset)
    if len(content) != count * np.dtype(dtype).itemsize:
        raise DataError(f"{path} became shorter while it was being read")
    return np.frombuffer(content, dtype)


def _read_header(descriptor: int, path: Path, size: int) -> tuple[np.dtype, int, int]:
    content = _read_exactly(descriptor, HEADER.size, 0)
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        refuse_format(path, _read_exactly(descriptor, HEAD_BYTES, 0), "tokens")
        raise DataError(f"{path} is not a token index: it does not begin with a 34-byte MMIDIDX header")
    _, version, code, n_items, n_doc_idx = HEADER.unpack(content)
    if version != 1:
        raise DataError(f"{path} has index version {version}, and only version 1 is known")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code} at byte 17, and codes are 1 to 8")
    if DTYPES[code].kind == "f":
        raise DataError(f"{path} says that the .bin holds floating-point numbers (dtype code {code}), not tokens")
    expected = HEADER.size + 12 * n_items + 8 * n_doc_idx
    if size == expected + n_items > expected:
        raise DataError(
            f"{path} is an index of Megatron's multimodal builder: after the documents it has a mode for each of its "
            f"{n_items} items, and what has another mode than 0 is not text",
            remedy="Build the file without multimodal",
        )
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but its header counts {n_items} items and {n_doc_idx} document marks, which "
            f"take {expected}",
            remedy="It is truncated or damaged; make it again",
        )
    return DTYPES[code], n_items, n_doc_idx


def _check_items(descriptor: int, tokens: IndexedTokens, n_items: int, bin_size: int) -> None:
    path, itemsize, position = idx_path(tokens.prefix), tokens.dtype.itemsize, 0
    for start in range(0, n_items, _BLOCK_ITEMS):
        count = min(_BLOCK_ITEMS, n_items - start)
        sizes = _read_array(descriptor, path, "<i4", count, HEADER.size + 4 * start)
        pointers = _read_array(descriptor, path, "<i8", count, HEADER.size + 4 * n_items + 8 * start)
        if (sizes < 0).any():
            item = int(np.argmax(sizes < 0))
            raise DataError(f"{path}: item {start + item} has size {sizes[item]}, which is negative")
        ends = position + np.cumsum(sizes, dtype=np.int64) * itemsize
        expected = ends - sizes * np.int64(itemsize)
        if (pointers != expected).any():
            item = int(np.argmax(pointers != expected))
            raise DataError(
                f"{path}: item {start + item} points to byte {pointers[item]}, expected {expected[item]} "
                "(items follow each other without gaps)"
            )
        position = int(ends[-1])
    if position != bin_size:
        with open(bin_path(tokens.prefix), "rb") as handle:
            refuse_format(bin_path(tokens.prefix), handle.read(HEAD_BYTES), "tokens")
        raise DataError(
            f"{bin_path(tokens.prefix)} has {bin_size} bytes, but {path.name} describes {position}",
            remedy="The two files do not belong together, or one is truncated",
        )


def _check_documents(descriptor: int, path: Path, n_items: int, n_doc_idx: int) -> None:
    offset, previous = HEADER.size + 12 * n_items, 0
    for start in range(0, n_doc_idx, _BLOCK_ITEMS):
        count = min(_BLOCK_ITEMS, n_doc_idx - start)
        marks = _read_array(descriptor, path, "<i8", count, offset + 8 * start)
        steps = np.diff(marks, prepend=previous)
        if (start == 0 and marks[0] != 0) or (steps < 0).any() or int(marks.max()) > n_items:
            raise DataError(f"{path}: doc_idx must rise from 0 to the number of items ({n_items}) and does not")
        previous = int(marks[-1])
    if n_doc_idx == 0 or previous != n_items:
        raise DataError(f"{path}: doc_idx ends at {previous}, expected the number of items, {n_items}")


class TokenFileWriter:
    """Streams documents into `<prefix>.bin` and `.idx`, which appear when the `with` block ends without an exception.

    Memory does not grow with the number of documents. After the block, `files` maps each file's name to its digest.
    """

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.n_tokens = 0
        self.n_documents = 0
        self.files: dict[str, FileDigest] = {}
        dtype_code(self.dtype)

    def __enter__(self) -> TokenFileWriter:
        unique = f"{TEMPORARY_PREFIX}{self.prefix.name}-{uuid.uuid4().hex[:8]}"
        self._temporary = self.prefix.with_name(unique)
        self._open_files = ExitStack()
        self._bin = self._open_files.enter_context(HashedFile(bin_path(self._temporary)))
        self._sizes = self._open_files.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent))
        return self

    def write(self, tokens: bytes | memoryview | np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens back to back (an array of `dtype`, or its bytes) and each one's length."""
        self.write_tokens(tokens)
        self.end_documents(lengths)

    def write_tokens(self, tokens: bytes | memoryview | np.ndarray) -> None:
        """Append tokens of a document whose end is told later, for documents larger than memory."""
        self._bin.write(np.ascontiguousarray(tokens) if isinstance(tokens, np.ndarray) else tokens)

    def end_documents(self, lengths: np.ndarray) -> None:
        """Say how the tokens written since the last call divide into documents."""
        self._sizes.write(lengths.astype("<i4").tobytes())
        self.n_tokens += int(lengths.sum(dtype=np.int64))
        self.n_documents += len(lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._open_files:
                if kind is None:
                    self._write_index()
            if kind is None:
                self._commit()
        finally:
            bin_path(self._temporary).unlink(missing_ok=True)
            idx_path(self._temporary).unlink(missing_ok=True)

    def _write_index(self) -> None:
        if self._bin.digest.bytes != self.n_tokens * self.dtype.itemsize:
            raise ValueError("the lengths given to TokenFileWriter do not add up to the tokens")
        marks = (
            np.arange(start, min(start + _BLOCK_ITEMS, self.n_documents + 1))
            for start in range(0, self.n_documents + 1, _BLOCK_ITEMS)
        )
        with HashedFile(idx_path(self._temporary)) as index:
            for block in _index_blocks(self._size_blocks, self.n_documents, self.dtype, self.n_documents + 1, marks):
                index.write(block)
        self.files = {
            bin_path(self.prefix).name: self._bin.digest,
            idx_path(self.prefix).name: index.digest,
        }

    def _size_blocks(self) -> Iterator[np.ndarray]:
        self._sizes.seek(0)
        while block := self._sizes.read(4 * _BLOCK_ITEMS):
            yield np.frombuffer(block, "<i4")

    def _commit(self) -> None:
        idx_path(self.prefix).unlink(missing_ok=True)  # never an old index beside a new .bin
        os.replace(bin_path(self._temporary), bin_path(self.prefix))
        os.replace(idx_path(self._temporary), idx_path(self.prefix))
        fsync_directory(self.prefix.parent)
