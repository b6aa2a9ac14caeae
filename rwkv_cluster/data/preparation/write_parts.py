"""The finished token files: stored documents split, put in order, written, and packed where samples are documents."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import TokenFileWriter
from rwkv_cluster.data.hashed_file import FileDigest
from rwkv_cluster.data.loss_mask import mask_path
from rwkv_cluster.data.manifest import VALIDATION, PackingRecord, ValidationRecord
from rwkv_cluster.data.preparation import marked_tokens
from rwkv_cluster.data.preparation.pack import pack, require_windows, resets
from rwkv_cluster.data.preparation.shuffle_split import (
    Choose,
    Order,
    Writer,
    all_documents,
    is_training,
    is_validation,
    split_threshold,
    write_documents,
)
from rwkv_cluster.data.preparation.token_store import EncodedDocuments
from rwkv_cluster.data.preparation.tokenize import Progress

log = logging.getLogger("rwkv_cluster")


class WrittenPart(NamedTuple):
    """A token file and what the manifest says of it. n_trained, packing: None where it has no mask, or no windows."""

    files: dict[str, FileDigest]
    n_tokens: int
    n_documents: int
    n_trained: int | None = None
    packing: PackingRecord | None = None


def validation_record(parts: list[WrittenPart]) -> ValidationRecord | None:
    """What the manifest says of the documents held out; None where none are."""
    if len(parts) == 1:
        return None
    facts = parts[1]._asdict()
    del facts["files"]
    return ValidationRecord(**facts)


@dataclass(frozen=True)
class PartsWriter:
    """Writes the token files of one preparation.

    name, dtype: of the training file. ctx_len: of windows. have_mask: whether some token is not trained on. scratch: a
    folder for what is in between; finished: one for the files.
    """

    data: DataConfig
    name: str
    dtype: np.dtype
    ctx_len: int
    have_mask: bool
    scratch: Path
    finished: Path

    def write(self, store: EncodedDocuments) -> list[WrittenPart]:
        """The training documents and, where some are held out, those. Raises DataError where no sample is left."""
        fraction = self.data.validation_fraction
        threshold = split_threshold(store, fraction) if fraction else 0
        seed = self.data.seed if self.data.shuffle else None
        is_packed = resets(self.data, have_mask=self.have_mask)
        passes = 1 if is_packed else self.data.n_epochs_duplication
        progress = Progress("writing", self.scratch, None if fraction else store.n_tokens * passes)

        def written(name: str, choose: Choose, order: Order) -> WrittenPart:
            with self._new_writer(name, store) as writer:
                write_documents(store, writer, choose, self.scratch, order, progress.advance)
            n_trained = writer.n_trained if isinstance(writer, marked_tokens.MarkedTokensWriter) else None
            return WrittenPart(writer.files, writer.n_tokens, writer.n_documents, n_trained)

        parts = [written(self.name, is_training(threshold) if fraction else all_documents, Order(passes, seed))]
        if fraction:
            parts.append(written(VALIDATION, is_validation(threshold), Order(1, seed, side=1)))
        return self._packed(parts) if is_packed else parts

    def _new_writer(self, name: str, store: EncodedDocuments) -> Writer:
        prefix = self.finished / name
        if store.dtype == self.dtype and not self.have_mask:
            return TokenFileWriter(prefix, self.dtype)
        return marked_tokens.MarkedTokensWriter(prefix, self.dtype, with_mask=self.have_mask)

    def _packed(self, parts: list[WrittenPart]) -> list[WrittenPart]:
        """The parts with the windows that their documents are packed into."""
        if self.data.n_epochs_duplication > 1 and "n_epochs_duplication" in self.data.model_fields_set:
            log.info(
                "documents are packed, each once: data.n_epochs_duplication copies are of use to one stream only. "
                "training.num_epochs says how often they are read"
            )
        packed = []
        for name, part in zip((self.name, VALIDATION), parts, strict=False):
            prefix = self.finished / name
            mask = mask_path(prefix) if self.have_mask else None
            windows = pack(prefix, self.finished / f"{name}.windows", self.data, self.ctx_len, mask)
            packed.append(part._replace(files=part.files | windows.files, packing=windows.record))
        require_windows(packed[0].packing)
        return packed
