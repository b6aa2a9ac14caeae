"""Prepare data: inputs -> `train.bin`, `train.idx`, a copy of the tokenizer, `manifest.json` in one directory.

Where some tokens are not trained on, `train.mask` is beside them (`val.mask` too where documents are held out).

Documents are tokenized in input order into a store (`token_store`), by worker processes where there is much of it, then
split and shuffled into the token files (`shuffle_split`). Everything happens in a temporary folder of the same
directory; the old manifest is removed, the files are renamed into place, and the new manifest is written last, so a
preparation that is killed at any point leaves nothing that a later run trusts. The same input, options and seed give
the same bytes on any machine, in any directory, with any number of cores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import DataConfig, ModelConfig
from rwkv_cluster.data.binidx import TokenFileWriter
from rwkv_cluster.data.conversations.row_format import RowRules, row_rules
from rwkv_cluster.data.hashed_file import FileDigest, HashedFile
from rwkv_cluster.data.inputs.readers import as_array, refuse_by_name
from rwkv_cluster.data.inputs.sources import Source, find_sources
from rwkv_cluster.data.manifest import (
    VALIDATION,
    VERSION,
    DataManifest,
    FileRecord,
    check_name,
    is_windows,
    load_manifest,
)
from rwkv_cluster.data.preparation.encode import DocumentEncoder
from rwkv_cluster.data.preparation.external_tokens import check_pair, refuse_masks
from rwkv_cluster.data.preparation.pack import pack, require_windows, resets
from rwkv_cluster.data.preparation.publish import commit, disk_errors, exclusive, temporary_folder
from rwkv_cluster.data.preparation.shuffle_split import (
    Order,
    all_documents,
    write_documents,
)
from rwkv_cluster.data.preparation.staleness import (
    Wanted,
    array_digest,
    content_options,
    named_inputs,
    packing_options,
    read_cache,
    rows_of,
    source_digest,
    source_stat,
    why_stale,
    write_cache,
)
from rwkv_cluster.data.preparation.token_store import EncodedDocuments
from rwkv_cluster.data.preparation.tokenize import Tokenization, TokenizedInputs
from rwkv_cluster.data.preparation.write_parts import PartsWriter, validation_record
from rwkv_cluster.data.verify import DamagedFileError, check_files
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.tokenizer import id_dtype, save_vocab, saved_name, tokenizer_identity
from rwkv_cluster.workdir import DATA_MANIFEST, remove_temporaries, sha256_file

__all__ = ["DataManifest", "load_manifest", "prepare", "prepared_before", "reason_to_prepare", "write_pair"]

log = logging.getLogger("rwkv_cluster")

DEFAULT_CTX_LEN = ModelConfig().ctx_len


@dataclass(frozen=True)
class Earlier:
    """What to do about an earlier preparation.

    mend: make a damaged file of it again, instead of raising DataError. fingerprint: of the data that a run was trained
    on, to refuse any other when it is ready.
    """

    mend: bool = True
    fingerprint: str | None = None


def prepare(
    data: DataConfig,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    arrays: Sequence[np.ndarray] = (),
    name: str = "train",
    ctx_len: int = DEFAULT_CTX_LEN,
    earlier: Earlier = Earlier(),
) -> DataManifest:
    """Prepare `arrays` and then `data.inputs` into `out_dir`, or use what is there again when nothing has changed.

    arrays: 1-D or 2-D, integers or whole numbers; see `inputs.readers`. tokenizer: any object with encode, decode and
    vocab_size. A single `.bin`/`.idx` pair without a validation split is used where it is. ctx_len: of the samples that
    documents are packed into, where they are. earlier: what to do about an earlier preparation. Raises DataError, with
    the document and the reason; an earlier preparation then stays as it was.
    """
    if not data.inputs and not len(arrays):
        raise DataError("there is no input", remedy="Name files, folders or patterns in data.inputs, or give arrays")
    if check_name(name) == VALIDATION:
        raise DataError(f"data name '{VALIDATION}' is the name of the held-out documents", remedy="Choose another")
    left_out: list[Path] = []
    sources = tuple(find_sources(data, left_out))
    job = _Job(data, tokenizer, Path(out_dir), _given(arrays), sources, name, ctx_len)
    if left_out:
        log.info(
            "%d files of data.inputs are left out, as earlier runs wrote them: %s", len(left_out), _names(left_out)
        )
    with disk_errors(job.out_dir):
        job.out_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(job.out_dir):
            remove_temporaries(job.out_dir)
            reusable = job.reusable(refresh=True)
            if isinstance(reusable, DataManifest):
                reusable = job.undamaged(reusable, mend=earlier.mend)
            if isinstance(reusable, DataManifest):
                log.info("data in %s is unchanged and is used again: %s", out_dir, _summary(reusable))
                return reusable
            log.info("preparing data in %s: %s", out_dir, reusable)
            write = job.adopt if job.is_in_place else job.run
            manifest = write(earlier.fingerprint)
    log.info("data prepared in %s: %s", out_dir, _summary(manifest))
    return manifest


def reason_to_prepare(
    data: DataConfig,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    arrays: Sequence[np.ndarray] = (),
    name: str = "train",
    ctx_len: int = DEFAULT_CTX_LEN,
) -> str | None:
    """Why `prepare` would do its work anew, or None when it would use what is there. Writes nothing."""
    job = _Job(data, tokenizer, Path(out_dir), _given(arrays), tuple(find_sources(data)), name, ctx_len)
    reusable = job.reusable(refresh=False)
    return reusable if isinstance(reusable, str) else None


def prepared_before(
    data: DataConfig,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    name: str = "train",
    ctx_len: int = DEFAULT_CTX_LEN,
) -> DataManifest | None:
    """What these `data.inputs` were prepared into with these settings, for when the inputs are gone; else None."""
    try:
        manifest = load_manifest(out_dir)
    except DataError:
        return None
    written = bool(manifest.options.get("write_jsonl"))
    options = content_options(data, jsonl=written, rows=rows_of(data, manifest))
    options |= packing_options(data, ctx_len, have_mask=manifest.n_trained is not None)
    same_inputs = read_cache(Path(out_dir))[0] == named_inputs(data)
    same = manifest.name == name and manifest.tokenizer == tokenizer_identity(tokenizer) and manifest.options == options
    return manifest if same_inputs and same else None


def _given(arrays: Sequence[Any]) -> tuple[np.ndarray, ...]:
    return tuple(as_array(array, f"array {number}") for number, array in enumerate(arrays, 1))


def write_pair(
    sources: Sequence[Source], encoder: DocumentEncoder, prefix: Path, *, passes: int, seed: int | None
) -> TokenFileWriter:
    """The documents of `sources` as one token file, without a manifest. seed: None keeps the input order."""
    with disk_errors(prefix.parent):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(prefix.parent) as folder:
            store = EncodedDocuments(folder, encoder.dtype, with_digests=False)
            Tokenization(encoder, store, None, folder).fill((), sources, sequence_length=1, num_workers=0)
            store.finish()
            _require_documents(store, sources)
            with TokenFileWriter(prefix, encoder.dtype) as writer:
                write_documents(store, writer, all_documents, folder, Order(passes, seed))
    return writer


@dataclass(frozen=True)
class _Job:
    """One call of `prepare`: what goes in and where it comes out."""

    data: DataConfig
    tokenizer: Any
    out_dir: Path
    arrays: tuple[np.ndarray, ...]
    sources: tuple[Source, ...]
    name: str
    ctx_len: int

    @property
    def writes_jsonl(self) -> bool:
        """Whether to write the documents as JSONL: when that is asked for and some are not JSONL yet."""
        convertible = bool(self.arrays) or any(source.kind in ("array", "text") for source in self.sources)
        return self.data.write_jsonl and convertible

    @property
    def is_in_place(self) -> bool:
        """Whether the input is one token file, to be used where it is."""
        only_tokens = not self.arrays and len(self.sources) == 1 and self.sources[0].kind == "tokens"
        return only_tokens and self.data.validation_fraction == 0

    @property
    def dtype(self) -> np.dtype:
        """The token files' dtype."""
        return np.dtype(id_dtype(int(self.tokenizer.vocab_size)))

    @property
    def vocabulary(self) -> str:
        """Name of the copy of the tokenizer's file."""
        return saved_name(self.tokenizer)

    def options(self, rows: str, *, have_mask: bool) -> dict[str, Any]:
        """What the manifest says of the settings. rows: see `content_options`."""
        options = packing_options(self.data, self.ctx_len, have_mask=have_mask)
        if self.is_in_place:
            return {"in_place": True} | options
        return content_options(self.data, jsonl=self.writes_jsonl, rows=rows) | options

    def reusable(self, *, refresh: bool) -> DataManifest | str:
        """The manifest of an earlier preparation that still holds, or why there is none."""
        try:
            manifest = load_manifest(self.out_dir)
        except MissingDataError as error:
            exists = (self.out_dir / DATA_MANIFEST).exists()
            return str(error) if exists else "it has not been prepared yet"
        except DataError as error:
            return str(error)
        reason = why_stale(
            manifest,
            self.out_dir,
            Wanted(
                name=self.name,
                tokenizer=tokenizer_identity(self.tokenizer),
                options=self.options(rows_of(self.data, manifest), have_mask=manifest.n_trained is not None),
                n_arrays=len(self.arrays),
                array_digests=self._array_digests,
                named=named_inputs(self.data),
                sources=self.sources,
            ),
            refresh=refresh,
        )
        return manifest if reason is None else reason

    def undamaged(self, manifest: DataManifest, *, mend: bool) -> DataManifest | str:
        """`manifest`, or what is wrong with its files where that can be mended. Raises DataError where it cannot."""
        try:
            check_files(manifest, self.out_dir, manifest.files if mend else manifest.run_files)
        except DamagedFileError as error:
            if not mend or not error.own:
                raise
            return error.fault
        return manifest

    def _array_digests(self) -> list[str]:
        encoder, length = DocumentEncoder(self.tokenizer), self.data.sequence_length
        return [array_digest(array, f"array {n}", encoder, length) for n, array in enumerate(self.arrays, 1)]

    def run(self, fingerprint: str | None) -> DataManifest:
        """Tokenize, split, shuffle, pack, commit."""
        refuse_by_name(self.sources)
        refuse_masks(self.sources)
        self._refuse_overwriting_inputs()
        stats = [source_stat(source) for source in self.sources]
        with temporary_folder(self.out_dir) as folder:
            finished = folder / "finished"
            finished.mkdir()
            rows = row_rules(self.data, self.sources)
            store, filled, jsonl = self._fill(rows, folder, finished)
            have_mask = filled.n_untrained > 0
            writer = PartsWriter(self.data, self.name, self.dtype, self.ctx_len, have_mask, folder, finished)
            parts = writer.write(store)
            files = parts[0].files | (parts[1].files if len(parts) > 1 else {})
            if jsonl is not None:
                files[jsonl.path.name] = jsonl.digest
            manifest = self._manifest(
                files | {self.vocabulary: self._save_vocab(finished)},
                self.options(rows.name, have_mask=have_mask),
                n_tokens=parts[0].n_tokens,
                n_documents=parts[0].n_documents,
                n_trained=parts[0].n_trained,
                packing=parts[0].packing,
                n_source_documents=store.n_documents,
                n_empty_documents=filled.n_empty,
                n_bad_lines=filled.n_bad_lines,
                dtype=self.dtype.name,
                source_digest=source_digest(filled.arrays, self.sources, filled.contents),
                validation=validation_record(parts),
            )
            _require_fingerprint(manifest, fingerprint)
            commit(self.out_dir, manifest, finished, self._stale_files(manifest))
        write_cache(self.out_dir, named_inputs(self.data), stats, filled.contents)
        return manifest

    def adopt(self, fingerprint: str | None) -> DataManifest:
        """Check a token file and refer to it; windows of its documents are written here."""
        refuse_masks(self.sources)
        (source,) = self.sources
        stats = [source_stat(source)]
        pair = check_pair(source.path, int(self.tokenizer.vocab_size))
        inside = source.path.absolute().parent == self.out_dir.absolute() and source.path.name == self.name
        files = {f"{self.name}.bin": pair.bin, f"{self.name}.idx": pair.idx}
        with temporary_folder(self.out_dir) as folder:
            finished = folder / "finished"
            finished.mkdir()
            packed = None
            if resets(self.data, have_mask=False):
                packed = pack(source.path, finished / f"{self.name}.windows", self.data, self.ctx_len, None)
                require_windows(packed.record)
                files |= {name: FileRecord(**digest._asdict()) for name, digest in packed.files.items()}
            manifest = self._manifest(
                files | {self.vocabulary: self._save_vocab(finished)},
                self.options("text", have_mask=False),
                packing=packed.record if packed else None,
                adopted=None if inside else os.path.abspath(source.path),
                n_tokens=pair.tokens.n_tokens,
                n_documents=pair.n_documents,
                n_source_documents=pair.n_documents,
                dtype=pair.tokens.dtype.name,
                source_digest=source_digest([], self.sources, [pair.content]),
            )
            _require_fingerprint(manifest, fingerprint)
            commit(self.out_dir, manifest, finished, filter(is_windows, self._stale_files(manifest)))
        write_cache(self.out_dir, named_inputs(self.data), stats, [pair.content])
        return manifest

    def _fill(
        self, rows: RowRules, folder: Path, finished: Path
    ) -> tuple[EncodedDocuments, TokenizedInputs, HashedFile | None]:
        encoder = DocumentEncoder(
            self.tokenizer,
            text_field=self.data.text_field,
            skip_bad_lines=self.data.skip_bad_lines,
            digest_key=self.data.seed if self.data.validation_fraction else None,
            with_jsonl=self.writes_jsonl,
            rows=rows,
        )
        store = EncodedDocuments(folder, encoder.stored_dtype, with_digests=encoder.has_digests)
        with ExitStack() as files:
            jsonl = files.enter_context(HashedFile(finished / f"{self.name}.jsonl")) if self.writes_jsonl else None
            filled = Tokenization(encoder, store, jsonl, folder).fill(
                self.arrays,
                self.sources,
                sequence_length=self.data.sequence_length,
                num_workers=self.data.num_workers,
            )
        store.finish()
        if filled.n_bad_lines:
            log.warning("%d lines were left out, the first: %s", filled.n_bad_lines, "; ".join(filled.bad_lines))
        _require_documents(store, self.sources)
        return store, filled, jsonl

    def _save_vocab(self, finished: Path) -> FileDigest:
        path = finished / self.vocabulary
        save_vocab(self.tokenizer, path)
        return FileDigest(path.stat().st_size, sha256_file(path))

    def _manifest(self, files: dict[str, Any], options: dict[str, Any], **fields: Any) -> DataManifest:
        records = {
            name: record if isinstance(record, FileRecord) else FileRecord(**record._asdict())
            for name, record in files.items()
        }
        return DataManifest(
            version=VERSION,
            name=self.name,
            prefix=self.name,
            vocab_size=int(self.tokenizer.vocab_size),
            files=records,
            tokenizer=tokenizer_identity(self.tokenizer),
            options=options,
            n_sources=len(self.arrays) + len(self.sources),
            **fields,
        )

    def _stale_files(self, manifest: DataManifest) -> set[str]:
        """What an earlier preparation of the same name wrote and this one does not replace."""
        try:
            previous = load_manifest(self.out_dir)
        except DataError:
            return set()
        if previous.name != self.name:
            return set()
        inputs = {os.path.realpath(path) for source in self.sources for path in source.files()}
        stale = set(previous.files) - set(manifest.files)
        if "in_place" in previous.options:
            stale = {name for name in stale if is_windows(name)}
        return {name for name in stale if os.path.realpath(self.out_dir / name) not in inputs}

    def _refuse_overwriting_inputs(self) -> None:
        prefixes = [self.name, *([VALIDATION] if self.data.validation_fraction else [])]
        suffixes = ("bin", "idx", "mask", "windows.bin", "windows.idx")
        names = [f"{prefix}.{suffix}" for prefix in prefixes for suffix in suffixes]
        names += [f"{self.name}.jsonl"] if self.writes_jsonl else []
        outputs = {os.path.realpath(self.out_dir / name) for name in [*names, self.vocabulary, DATA_MANIFEST]}
        for source in self.sources:
            for path in source.files():
                if os.path.realpath(path) in outputs:
                    raise DataError(
                        f"{path} is an input and would be overwritten by the output", remedy="Move it to another folder"
                    )


def _require_fingerprint(manifest: DataManifest, wanted: str | None) -> None:
    if wanted not in (None, manifest.fingerprint):
        raise DataError(
            f"the inputs now give other data (fingerprint {manifest.fingerprint}) than this run was trained on "
            f"({wanted})",
            remedy="Put the inputs and data settings back to continue, or choose another work_dir for a new run",
        )


def _require_documents(store: EncodedDocuments, sources: Sequence[Source]) -> None:
    if store.n_documents:
        return
    names = _names([source.path for source in sources])
    raise DataError(
        f"no document was found in {names}: the input is empty or blank", remedy="Give it some text or integers"
    )


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def _summary(manifest: DataManifest) -> str:
    held_out = f", {manifest.validation.n_documents} held out" if manifest.validation else ""
    trained = "" if manifest.n_trained is None else f" ({manifest.n_trained:,} trained on)"
    return (
        f"{manifest.n_tokens:,} tokens{trained}, {manifest.n_documents:,} documents from "
        f"{manifest.n_source_documents:,}{held_out}, {manifest.dtype}, vocabulary {manifest.vocab_size:,}"
    )
