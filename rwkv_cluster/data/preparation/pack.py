"""Packing: the documents of a token file, whole, into windows of `ctx_len` positions.

A document of L tokens takes L - 1 positions, for its first token is predicted from nothing. Each goes, in the order of
the file, into the window that it leaves the least of (best fit, of all windows that are open), so that a seeded shuffle
of the documents decides what lies together. The windows are written as `data.windows` describes them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import IndexedTokens, TokenFileWriter, open_tokens
from rwkv_cluster.data.hashed_file import FileDigest
from rwkv_cluster.data.loss_mask import LossMask
from rwkv_cluster.data.manifest import PackingRecord
from rwkv_cluster.errors import DataError
from rwkv_cluster.runtime.terminal.time_left import Countdown

log = logging.getLogger("rwkv_cluster")

_MASK_TOKENS = 1 << 24  # that are counted at a time
_SPANS = 1 << 16  # that are placed, or written, at a time


@dataclass(frozen=True)
class Packed:
    """Windows that were written. files: their digests by name."""

    record: PackingRecord
    files: dict[str, FileDigest]


@dataclass
class _Spans:
    """Documents, or parts of them, in the order of the file: first token and number of positions of each."""

    first: np.ndarray
    size: np.ndarray

    def choose(self, chosen: np.ndarray) -> _Spans:
        return _Spans(self.first[chosen], self.size[chosen])


def resets(data: DataConfig, *, have_mask: bool) -> bool:
    """Whether documents are packed. have_mask: whether some tokens are not trained on."""
    return have_mask if data.documents is None else data.documents == "reset"


def pack(prefix: Path, windows: Path, data: DataConfig, ctx_len: int, mask: Path | None) -> Packed:
    """Pack the token file `prefix` into windows at the prefix `windows`. mask: of the token file, None where all count.

    Raises DataError where no document is left; what was left out is in the record, and said.
    """
    with open_tokens(prefix) as tokens:
        loss_mask = None if mask is None else LossMask(mask, tokens.n_tokens)
        spans, counts = _spans(tokens, ctx_len, data.too_long)
        trained = spans.size if loss_mask is None else _count_trained(spans, loss_mask)
    counts["n_untrained"] = int((trained == 0).sum())
    spans, trained = spans.choose(trained > 0), trained[trained > 0]
    window = _best_fit(spans.size, ctx_len)
    writer = _write(spans, window, windows)
    record = PackingRecord(
        ctx_len=ctx_len,
        n_windows=writer.n_documents,
        n_spans=len(window),
        n_positions=int(spans.size.sum()),
        n_trained=int(trained.sum()),
        **counts,
    )
    log.info("%s packed: %s", prefix.name, record.in_words())
    return Packed(record, writer.files)


def require_windows(record: PackingRecord | None) -> None:
    """Raises DataError where documents are packed and every one was left out."""
    if record is not None and not record.n_windows:
        raise DataError(
            f"every document was left out of the samples of {record.ctx_len} tokens: {record.in_words()}",
            remedy="Look at what is trained on, use a larger model.ctx_len, or data.too_long split",
        )


def _spans(tokens: IndexedTokens, ctx_len: int, too_long: str) -> tuple[_Spans, dict[str, int]]:
    """Every document's spans, and what became of those that are too long or too short."""
    ends = np.concatenate([[0], np.cumsum(tokens.sizes, dtype=np.int64)])[tokens.doc_idx]
    first, size = ends[:-1], np.diff(ends) - 1
    n_too_short = int((size == 0).sum())
    is_document = size > 0
    first, size = first[is_document], size[is_document]
    is_long = size > ctx_len
    n_long, n_over = int(is_long.sum()), int((size[is_long] - ctx_len).sum())
    if too_long == "split":
        parts = -(-size // ctx_len)
        index = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # of a part in its document
        size = np.minimum(np.repeat(size, parts) - index * ctx_len, ctx_len)
        return _Spans(np.repeat(first, parts) + index * ctx_len, size), _counts(n_too_short, n_split=n_long)
    if too_long == "drop":
        lost = int(size[is_long].sum())
        kept = _Spans(first, size).choose(~is_long)
        return kept, _counts(n_too_short, n_dropped=n_long, n_positions_lost=lost)
    kept = _Spans(first + np.maximum(size - ctx_len, 0), np.minimum(size, ctx_len))
    return kept, _counts(n_too_short, n_cut=n_long, n_positions_lost=n_over)


def _counts(n_too_short: int, **long: int) -> dict[str, int]:
    return {"n_too_short": n_too_short, **long}


def _count_trained(spans: _Spans, mask: LossMask) -> np.ndarray:
    """Number of targets of each span that are trained on."""
    counts = np.zeros(len(spans.size), np.int64)
    start = 0
    while start < len(counts):
        base = int(spans.first[start])
        stop = max(start + 1, int(np.searchsorted(spans.first, base + _MASK_TOKENS)))
        begin, end = spans.first[start:stop] + 1 - base, spans.first[start:stop] + 1 + spans.size[start:stop] - base
        before = np.concatenate([[0], np.cumsum(mask.read(base, int(end[-1])), dtype=np.int64)])
        counts[start:stop] = before[end] - before[begin]
        start = stop
    return counts


def _best_fit(sizes: np.ndarray, ctx_len: int) -> np.ndarray:
    """Window of each span [n] int64, windows numbered as they are opened.

    `open_windows` has them by what is free in them, and bit i of `free` says whether there is one with i positions: the
    lowest bit from a span's size on is the best fit.
    """
    placed = np.empty(len(sizes), np.int64)
    open_windows: list[list[int]] = [[] for _ in range(ctx_len + 1)]
    free = n_windows = 0
    with Countdown("packing", len(sizes), "documents") as left:
        for start in range(0, len(sizes), _SPANS):
            block = []
            for size in sizes[start : start + _SPANS].tolist():
                if fitting := free >> size:
                    room = size + (fitting & -fitting).bit_length() - 1
                    window = open_windows[room].pop()
                    if not open_windows[room]:
                        free ^= 1 << room
                else:
                    room, window = ctx_len, n_windows
                    n_windows += 1
                block.append(window)
                if room := room - size:
                    open_windows[room].append(window)
                    free |= 1 << room
            placed[start : start + len(block)] = block
            left.advance(len(block))
    return placed


def _write(spans: _Spans, window: np.ndarray, prefix: Path) -> TokenFileWriter:
    order = np.argsort(window, kind="stable")
    n_spans = np.bincount(window)
    ends = np.cumsum(n_spans)
    with TokenFileWriter(prefix, np.int64) as writer:
        start = 0
        while start < len(n_spans):
            base = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, base + _SPANS, side="right")))
            part = order[base : int(ends[stop - 1])]
            pairs = np.stack([spans.first[part], spans.size[part]], axis=1)
            writer.write(pairs.reshape(-1), 2 * n_spans[start:stop])
            start = stop
    return writer
