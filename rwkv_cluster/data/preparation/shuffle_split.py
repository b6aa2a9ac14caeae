"""The final order of the documents: the validation split and the shuffle, in memory that does not grow with them.

Order. Document i of a pass has the i-th 64-bit draw of PCG64 (SeedSequence(seed, spawn_key=(pass, side))) as its key,
and documents are written by rising key. Raw draws of a bit generator are the part of NumPy whose values never change
between versions, so the same seed gives the same file everywhere. Documents are first dealt by their key's leading
bits into regions of a scratch file that fit in memory, and then each region is sorted: how many regions there are
cannot be seen in the result.

Split. Documents whose digest lies below a threshold are held out. The digest depends on the seed and on the tokens
only, so equal documents fall on the same side; the threshold is chosen so that the share of documents comes closest to
the fraction asked for, with at least one document on each side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_cluster.data.binidx import TokenFileWriter
from rwkv_cluster.data.hashed_file import as_bytes
from rwkv_cluster.data.preparation.marked_tokens import MarkedTokensWriter
from rwkv_cluster.data.preparation.token_store import Block, EncodedDocuments
from rwkv_cluster.errors import DataError

REGION_BYTES = 64 << 20
_BOOKKEEPING_BYTES = 64  # of memory for each document of a region, beside its tokens
_OUTPUT_BYTES = 1 << 20
_DIGEST_BINS = 1 << 16

Writer = TokenFileWriter | MarkedTokensWriter
Choose = Callable[[Block], np.ndarray]  # which documents of a block take part: [n] bool


def all_documents(block: Block) -> np.ndarray:
    """Choose every document."""
    return np.ones(len(block.lengths), bool)


def is_validation(threshold: int) -> Choose:
    """Choose the documents held out for validation."""
    return lambda block: _digests(block) < np.uint64(threshold)


def is_training(threshold: int) -> Choose:
    """Choose the documents to train on."""
    return lambda block: _digests(block) >= np.uint64(threshold)


def _digests(block: Block) -> np.ndarray:
    assert block.digests is not None
    return block.digests


def split_threshold(store: EncodedDocuments, fraction: float) -> int:
    """Documents with a digest below this number are held out. Raises DataError when all documents are equal."""
    counts = np.zeros(_DIGEST_BINS, np.int64)
    for block in store.blocks():
        counts += np.bincount((_digests(block) >> np.uint64(48)).astype(np.int64), minlength=_DIGEST_BINS)
    n_held_out = fraction * store.n_documents
    chosen = int(np.searchsorted(np.cumsum(counts), n_held_out))  # the bin that it falls into
    unique: dict[int, int] = {}
    for block in store.blocks():
        inside = _digests(block)[(_digests(block) >> np.uint64(48)) == chosen]
        for digest, count in zip(*np.unique(inside, return_counts=True), strict=True):
            unique[int(digest)] = unique.get(int(digest), 0) + int(count)
    held_out = int(counts[:chosen].sum())
    candidates = []
    for digest in sorted(unique):
        candidates.append((held_out, digest))
        held_out += unique[digest]
    candidates.append((held_out, max(unique) + 1))
    valid = [(abs(n - n_held_out), threshold) for n, threshold in candidates if 0 < n < store.n_documents]
    if not valid:
        raise DataError(
            f"data.validation_fraction is {fraction}, but there is only one document that is not a copy of another",
            remedy="Add documents or set data.validation_fraction to 0",
        )
    return min(valid)[1]


@dataclass(frozen=True)
class Order:
    """How often and in which order documents are written.

    passes: how often. seed: of the shuffle, None keeps the input order. side: keeps orders apart that share a seed.
    """

    passes: int
    seed: int | None
    side: int = 0


def write_documents(
    store: EncodedDocuments,
    writer: Writer,
    choose: Choose,
    scratch: Path,
    order: Order,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Write the chosen documents in `order`. advance: called with the number of tokens after each write."""
    for number in range(order.passes):
        if order.seed is None:
            _write_in_input_order(store, writer, choose, advance)
        else:
            keys = np.random.SeedSequence(entropy=order.seed, spawn_key=(number, order.side))
            _Shuffle(store, choose, keys, scratch).write(writer, advance)


def _write_in_input_order(
    store: EncodedDocuments, writer: Writer, choose: Choose, advance: Callable[[int], None]
) -> None:
    for block in store.blocks():
        chosen = np.flatnonzero(choose(block))
        if len(chosen) == 0:
            continue
        if block.large:
            _copy_large(store, block.first_token, int(block.lengths[0]), writer, advance)
            continue
        tokens = store.read(block)
        whole = len(chosen) == len(block.lengths)
        writer.write(tokens if whole else gather(tokens, block.lengths, chosen), block.lengths[chosen])
        advance(len(tokens))


def _copy_large(
    store: EncodedDocuments, first: int, length: int, writer: Writer, advance: Callable[[int], None]
) -> None:
    for tokens in store.token_blocks(first, length):
        writer.write_tokens(tokens)
        advance(len(tokens))
    writer.end_documents(np.array([length]))


def gather(tokens: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> np.ndarray | bytes:
    """Documents of `tokens` (back to back, [n] lengths) in the order of the indices `order`, back to back."""
    if len(lengths) and (lengths == lengths[0]).all():
        return tokens.reshape(len(lengths), -1)[order]
    ends = np.cumsum(lengths, dtype=np.int64) * tokens.itemsize
    starts = ends - lengths * np.int64(tokens.itemsize)
    content = tokens.data.cast("B")
    return b"".join([content[a:b] for a, b in zip(starts[order].tolist(), ends[order].tolist(), strict=True)])


@dataclass
class _Regions:
    """The scratch file's layout: for each region, how many documents and tokens it has and where they begin."""

    n_documents: np.ndarray
    n_tokens: np.ndarray

    def __post_init__(self) -> None:
        self.first_document = np.cumsum(self.n_documents) - self.n_documents
        self.first_token = np.cumsum(self.n_tokens) - self.n_tokens


class _Scratch:
    """Array of `dtype` in memory (`path` None) or in a file, written and read by element position."""

    def __init__(self, path: Path | None, dtype: np.dtype, size: int) -> None:
        self._dtype = dtype
        self._memory = np.empty(size, dtype) if path is None else None
        self._descriptor = -1 if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        if path is not None:
            path.unlink()

    def write(self, position: int, values: np.ndarray | bytes | memoryview) -> None:
        if self._memory is not None:
            array = values if isinstance(values, np.ndarray) else np.frombuffer(values, self._dtype)
            self._memory[position : position + array.size] = array.reshape(-1)
            return
        view = as_bytes(values)
        offset = position * self._dtype.itemsize
        while len(view):
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def read(self, position: int, count: int) -> np.ndarray:
        if self._memory is not None:
            return self._memory[position : position + count]
        values = np.empty(count, self._dtype)
        view, offset = as_bytes(values), position * self._dtype.itemsize
        while len(view) and (n_read := os.preadv(self._descriptor, [view], offset)):
            view, offset = view[n_read:], offset + n_read
        return values

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Shuffle:
    """One pass over the chosen documents in the order of their keys. A large document stays in the store: in a region
    it has length 0, and `_large` has its place by key and number."""

    def __init__(self, store: EncodedDocuments, choose: Choose, keys: np.random.SeedSequence, scratch: Path) -> None:
        self._store, self._choose, self._keys = store, choose, keys
        self._n_regions = self._count_regions()
        self._regions = self._plan_regions()
        self._large: dict[int, tuple[int, int]] = {}
        in_file = (lambda name: scratch / name) if self._n_regions > 1 else (lambda name: None)
        total = int(self._regions.n_documents.sum())
        self._tokens = _Scratch(in_file("region-tokens"), store.dtype, int(self._regions.n_tokens.sum()))
        self._lengths = _Scratch(in_file("region-lengths"), np.dtype(np.int32), total)
        self._sort_keys = _Scratch(in_file("region-keys"), np.dtype(np.uint64), total)

    def _keyed_blocks(self) -> Iterator[tuple[Block, np.ndarray, np.ndarray, np.ndarray]]:
        """Each block with its chosen documents: (block, indices, keys, lengths in a region)."""
        generator = np.random.PCG64(self._keys)
        for block in self._store.blocks():
            keys = generator.random_raw(len(block.lengths))
            chosen = np.flatnonzero(self._choose(block))
            if len(chosen):
                lengths = block.lengths[chosen]
                yield block, chosen, keys[chosen], np.zeros_like(lengths) if block.large else lengths

    def _count_regions(self) -> int:
        n_bytes = 0
        for _, chosen, _, lengths in self._keyed_blocks():
            n_bytes += int(lengths.sum(dtype=np.int64)) * self._store.dtype.itemsize + len(chosen) * _BOOKKEEPING_BYTES
        return -(-n_bytes // REGION_BYTES) or 1

    def _region_of(self, keys: np.ndarray) -> np.ndarray:
        return ((keys >> np.uint64(32)) * np.uint64(self._n_regions) >> np.uint64(32)).astype(np.int64)

    def _plan_regions(self) -> _Regions:
        n_documents, n_tokens = np.zeros(self._n_regions, np.int64), np.zeros(self._n_regions, np.int64)
        for _, _, keys, lengths in self._keyed_blocks():
            regions = self._region_of(keys)
            n_documents += np.bincount(regions, minlength=self._n_regions)
            n_tokens += np.bincount(regions, lengths, self._n_regions).astype(np.int64)  # exact below 2**53
        return _Regions(n_documents, n_tokens)

    def write(self, writer: Writer, advance: Callable[[int], None]) -> None:
        try:
            self._scatter()
            for region in range(self._n_regions):
                self._write_region(region, writer, advance)
        finally:
            for scratch in (self._tokens, self._lengths, self._sort_keys):
                scratch.close()

    def _scatter(self) -> None:
        """Pass 1 of the external bucket sort: copy chosen documents to their regions, in input order within each."""
        document, token = self._regions.first_document.copy(), self._regions.first_token.copy()
        for block, chosen, keys, lengths in self._keyed_blocks():
            regions = self._region_of(keys)
            order = np.argsort(regions, kind="stable")
            if block.large:
                region = int(regions[0])
                self._large[int(document[region])] = (block.first_token, int(block.lengths[0]))
                dealt = memoryview(b"")
            else:
                dealt = self._scattered(block, chosen[order])
            self._scatter_block(regions[order], keys[order], lengths[order], dealt, document, token)

    def _scattered(self, block: Block, order: np.ndarray) -> memoryview:
        tokens = self._store.read(block)
        in_order = len(order) == len(block.lengths) and self._n_regions == 1
        gathered = tokens if in_order else gather(tokens, block.lengths, order)
        return as_bytes(gathered)

    def _scatter_block(
        self,
        regions: np.ndarray,
        keys: np.ndarray,
        lengths: np.ndarray,
        dealt: memoryview,
        document: np.ndarray,
        token: np.ndarray,
    ) -> None:
        """Append documents that are sorted by region; `document` and `token` are each region's next free place."""
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        present, starts = np.unique(regions, return_index=True)
        itemsize = self._store.dtype.itemsize
        for region, start, stop in zip(present, starts, [*starts[1:], len(regions)], strict=True):
            first, last = int(ends[start]), int(ends[stop])
            self._tokens.write(int(token[region]), dealt[first * itemsize : last * itemsize])
            self._lengths.write(int(document[region]), lengths[start:stop])
            self._sort_keys.write(int(document[region]), keys[start:stop])
            document[region] += stop - start
            token[region] += last - first

    def _write_region(self, region: int, writer: Writer, advance: Callable[[int], None]) -> None:
        first, count = int(self._regions.first_document[region]), int(self._regions.n_documents[region])
        tokens = self._tokens.read(int(self._regions.first_token[region]), int(self._regions.n_tokens[region]))
        lengths = self._lengths.read(first, count)
        order = np.argsort(self._sort_keys.read(first, count), kind="stable")
        large = {
            position - first: place for position, place in self._large.items() if first <= position < first + count
        }
        cuts = np.flatnonzero(np.isin(order, list(large))).tolist()
        start = 0
        for cut in [*cuts, count]:
            _write_ordered(tokens, lengths, order[start:cut], writer, advance)
            if cut < count:
                _copy_large(self._store, *large[int(order[cut])], writer, advance)
            start = cut + 1


def _write_ordered(
    tokens: np.ndarray,
    lengths: np.ndarray,
    order: np.ndarray,
    writer: Writer,
    advance: Callable[[int], None],
) -> None:
    """Write documents in order, a few megabytes at a time."""
    ends = np.cumsum(lengths[order], dtype=np.int64)
    most, start = _OUTPUT_BYTES // tokens.itemsize, 0
    while start < len(order):
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + most, side="right")))
        writer.write(gather(tokens, lengths, order[start:stop]), lengths[order[start:stop]])
        advance(int(ends[stop - 1]) - base)
        start = stop
