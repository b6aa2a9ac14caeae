"""The reader and builder names that RWKV-LM, Megatron and `rwkv-trainer` scripts use, over `data.binidx`."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.data.binidx import bin_path, dtype_code, idx_path, index_bytes, open_tokens
from rwkv_cluster.errors import DataError
from rwkv_cluster.workdir import TEMPORARY_PREFIX, atomic_write


class MMapIndexedDataset:
    """Items of a token file by number, negative number or slice. Arrays are read-only views of the memory map.

    Raises DataError when the pair is missing or damaged. `skip_warmup` is accepted and has no effect.
    """

    def __init__(self, path: str | Path, skip_warmup: bool = False) -> None:
        self._file = open_tokens(path)
        self._doc_idx: np.ndarray | None = None  # in place of the file's

    def __getstate__(self) -> tuple[str, np.ndarray | None]:
        return str(self._file.prefix.absolute()), self._doc_idx

    def __setstate__(self, state: tuple[str, np.ndarray | None]) -> None:
        self._file, self._doc_idx = open_tokens(state[0]), state[1]

    def __enter__(self) -> MMapIndexedDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """Tokens of one item, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self.get(item) for item in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of item `idx`; length defaults to the rest of the item."""
        number = range(len(self))[idx]  # IndexError, negative numbers and NumPy integers as for a list
        size = int(self._file.sizes[number])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens {offset} to {stop} are not in item {number}, which has {size}")
        start = int(self._file.pointers[number]) // self._file.dtype.itemsize
        return np.asarray(self._file.tokens[start + offset : start + stop])

    @property
    def dtype(self) -> np.dtype:
        return self._file.dtype

    @property
    def sizes(self) -> np.ndarray:
        """[S] int32, tokens in each item."""
        return self._file.sizes

    @property
    def doc_idx(self) -> np.ndarray:
        """[D] int64: 0, then the number of items after each document."""
        return self._file.doc_idx if self._doc_idx is None else self._doc_idx

    def get_doc_idx(self) -> np.ndarray:
        """The index of the first item of each document, `doc_idx`."""
        return self.doc_idx

    def set_doc_idx(self, doc_idx_: np.ndarray) -> None:
        """Replace `doc_idx` in memory; the file stays as it is."""
        self._doc_idx = doc_idx_

    @property
    def supports_prefetch(self) -> bool:
        return False

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether both files of the pair exist."""
        return bin_path(path).is_file() and idx_path(path).is_file()

    def close(self) -> None:
        """Close the file, as often as you like; arrays taken from it stay valid. Reading then raises ValueError."""
        self._file.close()


class MMapIndexedDatasetBuilder:
    """Builds a token file item by item: `add_item`, `end_document`, and `finalize`, after which both files exist.

    out_file: the `.bin`. dtype: uint16 or another integer dtype of the format.
    """

    def __init__(self, out_file: str | Path, dtype: Any = np.uint16) -> None:
        self._path = Path(out_file)
        self._dtype = np.dtype(dtype)
        dtype_code(self._dtype)
        self._temporary = self._path.with_name(f"{TEMPORARY_PREFIX}{self._path.name}-{uuid.uuid4().hex[:8]}")
        self._file = open(self._temporary, "xb")  # noqa: SIM115 -- closed by finalize
        self._sizes: list[int] = []
        self._doc_idx = [0]

    def add_item(self, np_array: np.ndarray) -> None:
        """Append an array of the builder's dtype. Raises DataError for another dtype: a cast could wrap around."""
        if np_array.dtype != self._dtype:
            raise DataError(
                f"item {len(self._sizes)} has dtype {np_array.dtype}, expected {self._dtype}", remedy="Convert it"
            )
        self._file.write(np_array.astype(self._dtype.newbyteorder("<"), copy=False).tobytes())
        self._sizes.append(np_array.size)

    def end_document(self) -> None:
        """The items added since the last call form a document."""
        self._doc_idx.append(len(self._sizes))

    def finalize(self, index_file: str | Path) -> None:
        """Commit the `.bin` and write the `.idx`. Items after the last `end_document` become one more document."""
        if self._doc_idx[-1] != len(self._sizes):
            self.end_document()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        Path(index_file).unlink(missing_ok=True)  # never an old index beside a new .bin
        os.replace(self._temporary, self._path)
        atomic_write(Path(index_file), index_bytes(self._sizes, self._dtype, self._doc_idx))
