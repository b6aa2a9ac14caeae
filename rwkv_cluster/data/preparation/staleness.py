"""Is prepared data still what the configuration asks for? If not, why not: that is what the user is told.

Content decides, by sha256. So that a large input is not read at every start, `inputs.json` beside the manifest keeps
each input's path, size and times; an input whose record is unchanged is not read again. That file is a cache: without
it, or on another machine, the inputs are read and the answer is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.conversations.template import template_identity
from rwkv_cluster.data.inputs.readers import array_values
from rwkv_cluster.data.inputs.sources import STDLIB, Source, content_digest
from rwkv_cluster.data.manifest import CACHE_NAME, DataManifest
from rwkv_cluster.data.preparation.encode import DocumentEncoder
from rwkv_cluster.data.preparation.pack import resets
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.workdir import atomic_write

FORMAT = 1  # raise when the same input and options give other bytes than before
_RECENT_NS = 3_000_000_000  # a file changed this recently may change again within its time stamp's resolution


def content_options(data: DataConfig, *, jsonl: bool, rows: str) -> dict[str, Any]:
    """The settings that decide what is written, as they are compared and stored.

    rows: what the rows of JSONL files are, see `RowRules.name`. Of text nothing is stored: data that another version
    prepared is used again.
    """
    names = (
        "sequence_length",
        "n_epochs_duplication",
        "text_field",
        "skip_bad_lines",
        "validation_fraction",
        "shuffle",
    )
    options = {name: getattr(data, name) for name in names} | {
        "seed": data.seed,
        "write_jsonl": data.write_jsonl and jsonl,
        "format": FORMAT,
    }
    return options | _row_options(data, rows)


def _row_options(data: DataConfig, rows: str) -> dict[str, Any]:
    if rows == "text":
        return {}
    if "conversations" not in rows:
        return {"rows": rows}
    return {"rows": rows, "template": template_identity(data.template), "train_on": data.train_on}


def packing_options(data: DataConfig, ctx_len: int, *, have_mask: bool) -> dict[str, Any]:
    """The settings that decide how documents are packed; none where they are one stream."""
    if not resets(data, have_mask=have_mask):
        return {}
    return {"documents": "reset", "too_long": data.too_long, "ctx_len": ctx_len}


def rows_of(data: DataConfig, manifest: DataManifest) -> str:
    """What the rows are if the content is what it was: where `data` leaves that to the content, they are the same."""
    return manifest.options.get("rows", "text") if data.format == "auto" else data.format


def new_array_digest(array: np.ndarray, sequence_length: int) -> Any:
    """sha256 object to be fed the array's documents as token ids: fewer bytes than the values, and as telling."""
    return hashlib.sha256(f"{array.shape} {sequence_length} ".encode())


def array_digest(array: np.ndarray, name: str, encoder: DocumentEncoder, sequence_length: int) -> str:
    """The same digest as a preparation takes on its way. Raises DataError for values that cannot be encoded."""
    digest = new_array_digest(array, sequence_length)
    for values in array_values(array, name, sequence_length):
        digest.update(encoder.encode_rows(values).tokens.data)
    return digest.hexdigest()


def source_digest(arrays: Sequence[str], sources: Sequence[Source], contents: Sequence[str]) -> str:
    """One sha256 for the whole input: what each part is and its content, in order. File names do not count."""
    parts: list[list[Any]] = [["array", digest] for digest in arrays]
    parts += [
        [source.kind, source.compression, source.optional, content]
        for source, content in zip(sources, contents, strict=True)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def source_stat(source: Source) -> list[Any]:
    """Path, kind, and size and times of each file of a source: equal lists mean that nothing was written to it."""
    record: list[Any] = [os.path.abspath(source.path), source.kind]
    for path in source.files():
        status = os.stat(path)
        record += [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return record


def named_inputs(data: DataConfig) -> list[str]:
    """What `data` names, whether or not it is there: its pattern and its entries, paths made absolute."""
    entries = [entry if entry == STDLIB else os.path.abspath(os.path.expanduser(entry)) for entry in data.inputs]
    return [data.file_pattern, *entries]


def write_cache(out_dir: Path, named: list[str], stats: Sequence[list[Any]], contents: Sequence[str]) -> None:
    """Remember what was named, and the content of the sources whose files were not changed in the last seconds."""
    settled = time.time_ns() - _RECENT_NS
    entries = [
        [record if max(record[3::3] + record[4::3]) < settled else None, content]
        for record, content in zip(stats, contents, strict=True)
    ]
    atomic_write(out_dir / CACHE_NAME, json.dumps({"named": named, "sources": entries}).encode())


def read_cache(out_dir: Path) -> tuple[list[str], list[list[Any]]]:
    """What was named, and [record or None, sha256] of each source; both empty where the file is absent or unusable."""
    try:
        content = json.loads(read_own(out_dir / CACHE_NAME))
        named, entries = content["named"], content["sources"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return [], []
    well_formed = (
        isinstance(named, list)
        and isinstance(entries, list)
        and all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) for entry in entries)
    )
    return (named, entries) if well_formed else ([], [])


@dataclass(frozen=True)
class Wanted:
    """Data that a configuration asks for.

    name: of the token file. tokenizer: see `tokenizer_identity`. options: that change the tokens. n_arrays: of arrays
    beside the files. array_digests: () -> the arrays' digests. named: see `named_inputs`. sources: the files.
    """

    name: str
    tokenizer: dict[str, Any]
    options: dict[str, Any]
    n_arrays: int
    array_digests: Callable[[], list[str]]
    named: list[str]
    sources: Sequence[Source]


def why_stale(manifest: DataManifest, out_dir: Path, wanted: Wanted, *, refresh: bool) -> str | None:
    """Why the data must be prepared again, in words, or None. Reads the inputs whose record has changed.

    refresh: write the new records when the content has not changed.
    """
    if manifest.name != wanted.name:
        return f"the prepared data is named '{manifest.name}', not '{wanted.name}'"
    if manifest.tokenizer != wanted.tokenizer:
        return f"the tokenizer changed ({_difference(manifest.tokenizer, wanted.tokenizer)})"
    if manifest.options != wanted.options:
        return f"the options changed ({_difference(manifest.options, wanted.options)})"
    if manifest.n_sources != wanted.n_arrays + len(wanted.sources):
        return f"the input has {wanted.n_arrays + len(wanted.sources)} files or arrays, it had {manifest.n_sources}"
    before, cache = read_cache(out_dir)
    known = cache if len(cache) == len(wanted.sources) else [[None, ""]] * len(wanted.sources)
    stats = [source_stat(source) for source in wanted.sources]
    contents = [
        content if record == stat else content_digest(source)
        for source, stat, (record, content) in zip(wanted.sources, stats, known, strict=True)
    ]
    if source_digest(wanted.array_digests(), wanted.sources, contents) != manifest.source_digest:
        compared = zip(wanted.sources, contents, known, strict=True)
        changed = [source.path for source, new, (_, old) in compared if old and new != old]
        return f"the content of {changed[0]} changed" if changed else "the content of the input changed"
    if refresh and (before != wanted.named or [record for record, _ in known] != stats):
        write_cache(out_dir, wanted.named, stats, contents)
    return None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in changed)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
