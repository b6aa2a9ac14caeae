"""Windows of a token file, by number: slices of its stream of tokens, or whole documents packed into as many positions.

A packed window is an item of a second token file, `<prefix>.windows`, whose values are pairs (first token, number of
positions): a span of n positions reads the tokens [first, first + n) and predicts [first + 1, first + 1 + n). Spans
start from an empty state; positions behind the last one are padding, which nothing is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rwkv_cluster.data.binidx import IndexedTokens, open_tokens
from rwkv_cluster.data.loss_mask import LossMask
from rwkv_cluster.data.manifest import DataManifest


class TokenBatch(NamedTuple):
    """Samples, b of T positions each.

    inputs, targets: [b,T] int64; a target is what follows its input. starts: [b,T] bool, True where the state before a
    position is empty: at each document's first and at the padding's; None: at none. trained: int64 indices into the
    b * T targets of those that are trained on; None: all. n_trained: how many the samples of the whole global step have
    together; None where all are, or where there is no step.
    """

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None = None
    trained: Tensor | None = None
    n_trained: int | None = None

    @staticmethod
    def of(tokens: Tensor) -> TokenBatch:
        """A batch of all that follows in each row of tokens [b, T + 1]."""
        return TokenBatch(tokens[:, :-1], tokens[:, 1:])


class Windows(Protocol):
    """What samples are read from."""

    ctx_len: int

    def read(self, windows: Sequence[int], length: int | None = None) -> TokenBatch:
        """A batch of the windows with these numbers. length: positions of each, by default ctx_len."""

    def count_trained(self, window: int) -> int:
        """Number of targets in a window that are trained on."""

    def groups(self, batch_size: int, max_tokens: int) -> list[tuple[list[int], int]]:
        """Numbers and length of the windows of each batch that covers the first `max_tokens` targets in file order."""


class FlatWindows:
    """Slices of `ctx_len` tokens of a file. Documents are not looked at, as in RWKV-LM."""

    def __init__(self, tokens: IndexedTokens, ctx_len: int, mask: LossMask | None = None) -> None:
        self.ctx_len = ctx_len
        self._tokens, self._mask = tokens, mask

    def read(self, windows: Sequence[int], length: int | None = None) -> TokenBatch:
        offsets, length = [window * self.ctx_len for window in windows], length or self.ctx_len
        batch = TokenBatch.of(torch.from_numpy(self._tokens.read_rows(offsets, length + 1).astype(np.int64)))
        if self._mask is None:
            return batch
        trained = self._mask.read_rows([offset + 1 for offset in offsets], length)
        return batch._replace(trained=torch.from_numpy(np.flatnonzero(trained)))

    def count_trained(self, window: int) -> int:
        if self._mask is None:
            return self.ctx_len
        return int(np.count_nonzero(self._mask.read(window * self.ctx_len + 1, self.ctx_len)))

    def groups(self, batch_size: int, max_tokens: int) -> list[tuple[list[int], int]]:
        """The last window may be shorter than ctx_len and then comes alone."""
        full, rest = divmod(min(self._tokens.n_tokens - 1, max_tokens), self.ctx_len)
        groups = [(list(range(i, min(i + batch_size, full))), self.ctx_len) for i in range(0, full, batch_size)]
        return groups + ([([full], rest)] if rest else [])


class PackedWindows:
    """Whole documents, or parts of those that are longer, side by side in `ctx_len` positions.

    packed: the token file of spans, see the module.
    """

    def __init__(
        self, tokens: IndexedTokens, packed: IndexedTokens, ctx_len: int, mask: LossMask | None = None
    ) -> None:
        self.ctx_len = ctx_len
        self._tokens, self._packed, self._mask = tokens, packed, mask
        self._counts = np.full(len(packed), -1, np.int32)  # of trained targets, as far as they were asked for

    def read(self, windows: Sequence[int], length: int | None = None) -> TokenBatch:
        length = length or self.ctx_len
        shape = (len(windows), length)
        spans = [self._spans(window) for window in windows]
        first, sizes = (np.concatenate([span[:, column] for span in spans]) for column in (0, 1))
        row = np.repeat(np.arange(len(windows)), [len(span) for span in spans])
        place = row * length + np.concatenate([np.cumsum(span[:, 1]) - span[:, 1] for span in spans])
        end = np.arange(len(windows)) * length + [span[:, 1].sum() for span in spans]
        positions = np.arange(sizes.sum()) + np.repeat(place - (np.cumsum(sizes) - sizes), sizes)  # in the flat batch

        read = self._tokens.read_pieces(first, sizes + 1).astype(np.int64)
        last = np.cumsum(sizes + 1) - 1
        inputs, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        inputs.reshape(-1)[positions] = np.delete(read, last)
        targets.reshape(-1)[positions] = np.delete(read, last - sizes)
        starts = np.zeros(shape, bool)
        starts.reshape(-1)[np.concatenate([place, end[end < (np.arange(len(windows)) + 1) * length]])] = True
        trained = positions if self._mask is None else positions[self._trained(first, sizes)]
        return TokenBatch(
            torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(starts), torch.from_numpy(trained)
        )

    def count_trained(self, window: int) -> int:
        if self._counts[window] < 0:
            spans = self._spans(window)
            sizes = spans[:, 1]
            trained = sizes.sum() if self._mask is None else np.count_nonzero(self._trained(spans[:, 0], sizes))
            self._counts[window] = trained
        return int(self._counts[window])

    def groups(self, batch_size: int, max_tokens: int) -> list[tuple[list[int], int]]:
        """Windows of the first `max_tokens` positions, padding included, and at least one."""
        count = min(len(self._packed), max(max_tokens // self.ctx_len, 1))
        return [(list(range(i, min(i + batch_size, count))), self.ctx_len) for i in range(0, count, batch_size)]

    def _spans(self, window: int) -> np.ndarray:
        """[n, 2] int64: first token and number of positions."""
        return self._packed[window].reshape(-1, 2)

    def _trained(self, first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        assert self._mask is not None
        pieces = zip(first.tolist(), sizes.tolist(), strict=True)
        return np.concatenate([self._mask.read(start + 1, size) for start, size in pieces])


def open_windows(manifest: DataManifest, out_dir: Path, ctx_len: int) -> Windows:
    """Windows of the training file."""
    return _open(manifest, out_dir, manifest.token_prefix(out_dir), manifest.prefix, ctx_len)


def open_validation(manifest: DataManifest, out_dir: Path, ctx_len: int) -> Windows | None:
    """Windows of the validation file; None where there is none, or nothing in it to predict."""
    prefix, record = manifest.validation_prefix(out_dir), manifest.validation
    if prefix is None or record is None or record.n_tokens < 2:
        return None
    if record.packing is not None and not record.packing.n_windows:
        return None
    return _open(manifest, out_dir, prefix, prefix.name, ctx_len)


def _open(manifest: DataManifest, out_dir: Path, prefix: Path, name: str, ctx_len: int) -> Windows:
    """name: of the file in the manifest."""
    tokens = open_tokens(prefix, manifest.vocab_size)
    mask_file, windows = f"{name}.mask", f"{name}.windows"
    mask = LossMask(manifest.path_of(out_dir, mask_file), tokens.n_tokens) if mask_file in manifest.files else None
    if manifest.packing is None:
        return FlatWindows(tokens, ctx_len, mask)
    return PackedWindows(tokens, open_tokens(out_dir / windows), ctx_len, mask)
