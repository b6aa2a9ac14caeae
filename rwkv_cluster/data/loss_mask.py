"""The loss mask of a token file: one bit a token, in a file `.mask` beside `.bin` and `.idx`.

Bit i % 8 (from the least significant) of byte i // 8 belongs to token i and says whether the model is trained to
predict it. Bits after the last token are 0. Without such a file every token is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from rwkv_cluster.data.hashed_file import FileDigest, HashedFile
from rwkv_cluster.errors import DataError


def mask_path(prefix: Path) -> Path:
    """The mask of the token file `prefix`."""
    return prefix.with_name(f"{prefix.name}.mask")


class LossMask:
    """The memory-mapped mask of a token file of `n_tokens`. Raises DataError for a file of another size, or none."""

    def __init__(self, path: Path, n_tokens: int) -> None:
        n_bytes = -(-n_tokens // 8)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}", remedy="Prepare the data again") from error
        if found != n_bytes:
            raise DataError(
                f"{path} has {found:,} bytes, expected {n_bytes:,} for {n_tokens:,} tokens",
                remedy="Prepare the data again",
            )
        self.n_tokens = n_tokens
        self._bytes = np.memmap(path, np.uint8, "r") if n_bytes else np.empty(0, np.uint8)

    def read(self, start: int, length: int) -> np.ndarray:
        """[length] bool: whether tokens `start` to `start + length - 1` are trained on."""
        if not 0 <= start <= start + length <= self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.n_tokens}")
        skipped = start % 8
        held = self._bytes[start // 8 : -(-(start + length) // 8)]
        return np.unpackbits(held, count=skipped + length, bitorder="little")[skipped:].view(bool)

    def read_rows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """[len(starts), length] bool."""
        return np.stack([self.read(start, length) for start in starts])


class LossMaskWriter:
    """Writes the mask of a token file, a part at a time; a context manager that closes the file."""

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path)
        self._held = np.empty(0, bool)  # fewer than 8
        self.n_tokens = self.n_trained = 0

    def write(self, trained: np.ndarray) -> None:
        """Append the bits of the next tokens: [n] bool."""
        self.n_tokens += trained.size
        self.n_trained += int(np.count_nonzero(trained))
        bits = np.concatenate([self._held, trained.astype(bool, copy=False).reshape(-1)])
        whole = bits.size // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._held = bits[whole:]

    def __enter__(self) -> LossMaskWriter:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._held.size:
            self._file.write(np.packbits(self._held, bitorder="little").tobytes())
        self._file.__exit__(kind, error, traceback)

    @property
    def digest(self) -> FileDigest:
        """Size and sha256 of the finished file."""
        return self._file.digest
