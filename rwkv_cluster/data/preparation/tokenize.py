"""Tokenize all inputs into an on-disk store, in input order, hashing each input on the way."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.data.hashed_file import HashedFile
from rwkv_cluster.data.inputs.readers import LineBlock, Values, array_values, line_blocks, npy_values
from rwkv_cluster.data.inputs.sources import Source, content_digest, read_blocks
from rwkv_cluster.data.preparation.encode import DocumentEncoder, Encoded, FileBlock, LargeFile, text_line
from rwkv_cluster.data.preparation.encode_large_file import encode_large_text
from rwkv_cluster.data.preparation.external_tokens import token_documents
from rwkv_cluster.data.preparation.marked_tokens import count_untrained, plain_ids
from rwkv_cluster.data.preparation.publish import PROGRESS_NAME
from rwkv_cluster.data.preparation.staleness import new_array_digest
from rwkv_cluster.data.preparation.token_store import EncodedDocuments
from rwkv_cluster.data.preparation.workers import EncodedHere, available_cores, ordered_map
from rwkv_cluster.runtime.heartbeat import write_record
from rwkv_cluster.runtime.terminal.live_line import clock_time

log = logging.getLogger("rwkv_cluster")

_BYTES_WORTH_WORKERS = 4 << 20
_TASK_BYTES = 1 << 20
_TASK_FILES = 256
_PROGRESS_S = 5.0


class Progress:
    """Every five seconds what is done, how much, how fast: one log line, and a record for who asks for the status.

    folder: of the unfinished files. total: tokens that there will be, where that is known.
    """

    def __init__(self, what: str, folder: Path, total: int | None = None) -> None:
        self._what = what
        self._path = folder / PROGRESS_NAME
        self._total = total
        self._start = self._last = time.monotonic()
        self._n_tokens = 0
        self._record(0.0)

    def advance(self, n_tokens: int) -> None:
        """`n_tokens` more are done."""
        self._n_tokens += n_tokens
        now = time.monotonic()
        if now - self._last >= _PROGRESS_S:
            self._last = now
            rate = self._n_tokens / (now - self._start)
            left = f", {clock_time((self._total - self._n_tokens) / rate)} left" if self._total and rate else ""
            log.info("%s: %.1f M tokens, %.1f M tokens/s%s", self._what, self._n_tokens / 1e6, rate / 1e6, left)
            self._record(rate)

    def _record(self, tokens_per_s: float) -> None:
        facts = {"what": self._what, "n_tokens": self._n_tokens, "total": self._total, "tokens_per_s": tokens_per_s}
        with suppress(OSError):  # the token files themselves tell of a disk that refuses
            write_record(self._path, facts)


@dataclass
class TokenizedInputs:
    """What reading the inputs told.

    contents: sha256 of each source's files, in the order of the sources. arrays: digests of the arrays. n_untrained:
    tokens that are not trained on.
    """

    contents: list[str]
    arrays: list[str] = field(default_factory=list)
    n_empty: int = 0
    n_bad_lines: int = 0
    n_untrained: int = 0
    bad_lines: list[str] = field(default_factory=list)


class Tokenization:
    """Fills one store from one set of inputs. jsonl: file for the documents that are not JSONL yet, or None."""

    def __init__(
        self, encoder: DocumentEncoder, store: EncodedDocuments, jsonl: HashedFile | None, scratch: Path
    ) -> None:
        self._encoder, self._store, self._jsonl, self._scratch = encoder, store, jsonl, scratch
        self._progress = Progress("tokenizing", scratch)

    def fill(
        self,
        arrays: Sequence[np.ndarray],
        sources: Sequence[Source],
        *,
        sequence_length: int,
        num_workers: int,
    ) -> TokenizedInputs:
        """Read everything. Raises DataError at the first document that breaks a rule."""
        filled = TokenizedInputs([""] * len(sources))
        for number, array in enumerate(arrays, 1):
            digest = new_array_digest(array, sequence_length)
            self._add_rows(array_values(array, f"array {number}", sequence_length), filled, digest)
            filled.arrays.append(digest.hexdigest())
        digests: dict[int, Any] = {}
        processes = _processes(sources, num_workers)
        for result in ordered_map(self._encode_task, _tasks(sources, digests), processes):
            if isinstance(result, EncodedHere):
                self._add_encoded_here(result.payload, sources, sequence_length, filled)
            else:
                for part in result:
                    self._add(part, filled)
        for number, digest in digests.items():
            filled.contents[number] = digest.hexdigest()
        return filled

    def _encode_task(self, task: LineBlock | FileBlock) -> Sequence[Encoded | LargeFile]:
        if isinstance(task, LineBlock):
            return [self._encoder.encode_lines(task)]
        return self._encoder.encode_files(task)

    def _add(self, part: Encoded | LargeFile, filled: TokenizedInputs) -> None:
        if isinstance(part, LargeFile):
            self._add_large_text(part, filled)
            return
        self._store.add(part.tokens, part.lengths, part.digests)
        if self._jsonl is not None and part.jsonl:
            self._jsonl.write(part.jsonl)
        filled.n_empty += part.n_empty
        filled.n_bad_lines += part.n_bad_lines
        filled.n_untrained += count_untrained(part.tokens)
        filled.bad_lines += part.bad_lines[: 3 - len(filled.bad_lines)]
        for number, content in part.contents:
            filled.contents[number] = content
        self._progress.advance(len(part.tokens))

    def _add_encoded_here(
        self, number: int, sources: Sequence[Source], sequence_length: int, filled: TokenizedInputs
    ) -> None:
        source = sources[number]
        filled.contents[number] = content_digest(source)
        if source.kind == "array":
            path = self._decompressed(source)
            self._add_rows(npy_values(path, str(source.path), sequence_length), filled)
            if path != source.path:
                path.unlink()
            return
        for pieces in token_documents(source.path, self._encoder.vocab_size):
            self._add_pieces(((piece.astype(self._encoder.dtype), None) for piece in pieces), str(source.path))

    def _decompressed(self, source: Source) -> Path:
        if not source.compression:
            return source.path
        path = self._scratch / "array.npy"
        with open(path, "xb") as handle:
            for block in read_blocks(source):
                handle.write(block)
        return path

    def _add_rows(self, rows: Iterable[Values], filled: TokenizedInputs, digest: Any = None) -> None:
        for values in rows:
            encoded = self._encoder.encode_rows(values)
            if digest is not None:
                digest.update(plain_ids(encoded.tokens, self._encoder.dtype).data)
            self._add(encoded, filled)

    def _add_large_text(self, part: LargeFile, filled: TokenizedInputs) -> None:
        digest = hashlib.sha256()
        blocks = read_blocks(part.source, digest)
        pieces = encode_large_text(self._encoder.tokenizer, blocks, part.source.path)
        self._add_pieces(self._with_jsonl(pieces), str(part.source.path))
        filled.contents[part.number] = digest.hexdigest()

    def _with_jsonl(self, pieces: Iterator[tuple[np.ndarray, str]]) -> Iterator[tuple[np.ndarray, str]]:
        if self._jsonl is None:
            yield from pieces
            return
        head, tail = text_line("").split(b'""')
        self._jsonl.write(head + b'"')
        for ids, text in pieces:
            self._jsonl.write(text_line(text)[len(head) + 1 : -len(tail) - 1])
            yield ids, text
        self._jsonl.write(b'"' + tail)

    def _add_pieces(self, pieces: Iterable[tuple[np.ndarray, Any]], place: str) -> None:
        digest = self._encoder.new_digest()

        def digested() -> Iterator[np.ndarray]:
            for ids, _ in pieces:
                if self._encoder.has_digests:
                    digest.update(ids)
                self._progress.advance(len(ids))
                yield ids

        self._store.add_pieces(digested(), digest.value, place)


def _processes(sources: Sequence[Source], num_workers: int) -> int:
    size = sum(source.path.stat().st_size for source in sources if source.kind in ("jsonl", "text"))
    return (num_workers or available_cores()) if size >= _BYTES_WORTH_WORKERS else 1


def _tasks(sources: Sequence[Source], digests: dict[int, Any]) -> Iterator[LineBlock | FileBlock | EncodedHere]:
    """Work in input order. `digests` gets the running sha256 of each JSONL source."""
    files: list[tuple[int, Source]] = []
    size = 0
    for number, source in enumerate(sources):
        if source.kind == "text":
            files.append((number, source))
            size += source.path.stat().st_size
        if files and (source.kind != "text" or size >= _TASK_BYTES or len(files) >= _TASK_FILES):
            yield FileBlock(tuple(files))
            files, size = [], 0
        if source.kind == "jsonl":
            digests[number] = hashlib.sha256()
            yield from line_blocks(source, digests[number])
        elif source.kind != "text":
            yield EncodedHere(number)
    if files:
        yield FileBlock(tuple(files))
