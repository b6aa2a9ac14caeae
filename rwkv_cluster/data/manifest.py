"""What a prepared directory says about itself. `manifest.json` is written last; without one nothing is prepared.

The manifest depends on the input, the tokenizer and the options only; it names no path outside its directory (but for
a token file that is used in place) and no time, so equal preparations have equal manifests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.runtime.own_file import open_own
from rwkv_cluster.workdir import DATA_MANIFEST, sha256_file

VALIDATION = "val"  # name of the token file of held-out documents
CACHE_NAME = "inputs.json"  # see `data.preparation.staleness`
VERSION: Literal[1] = 1
_MAX_BYTES = 16 << 20
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"

Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=f"^{_NAME}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Part):
    """Size and content of a file."""

    bytes: Count
    sha256: Sha256


class PackingRecord(_Part):
    """Windows of `ctx_len` positions into which documents were packed.

    n_spans: documents or parts of one in them. n_positions: of the windows, without padding; n_trained: of these, on
    whose targets the model is trained. n_split, n_cut, n_dropped: documents longer than a window, which are in several,
    whose end alone is there, or that were left out. n_too_short: documents of one token, which predict nothing.
    n_untrained: parts without a trained target, which were left out. n_positions_lost: that all this has left out.
    """

    ctx_len: Annotated[int, Field(ge=1)]
    n_windows: Count
    n_spans: Count
    n_positions: Count
    n_trained: Count
    n_split: Count = 0
    n_cut: Count = 0
    n_dropped: Count = 0
    n_too_short: Count = 0
    n_untrained: Count = 0
    n_positions_lost: Count = 0

    @property
    def waste(self) -> float:
        """Share of the windows that is padding."""
        return 1 - self.n_positions / (self.n_windows * self.ctx_len) if self.n_windows else 0.0

    def in_words(self) -> str:
        """What became of the documents, in a sentence's part."""
        left_out = {
            "long documents split": self.n_split,
            "long documents cut to their end": self.n_cut,
            "long documents left out": self.n_dropped,
            "documents of one token left out": self.n_too_short,
            "parts without a trained token left out": self.n_untrained,
        }
        parts = [f"{number:,} {what}" for what, number in left_out.items() if number]
        lost = f", {self.n_positions_lost:,} tokens lost with them" if self.n_positions_lost else ""
        windows = f"{self.n_windows:,} window{'' if self.n_windows == 1 else 's'} of {self.ctx_len:,}"
        return (
            f"{windows}, {self.n_positions:,} tokens packed, {self.n_trained:,} "
            f"trained on, {self.waste:.1%} waste" + (f"; {', '.join(parts)}{lost}" if parts else "")
        )


class ValidationRecord(_Part):
    """The held-out documents, in `val.bin` and `val.idx`. n_trained, packing: as in `DataManifest`."""

    n_tokens: Count
    n_documents: Count
    n_trained: Count | None = None
    packing: PackingRecord | None = None


class DataManifest(_Part):
    """A prepared directory.

    prefix: of the training token file, relative to the directory; `adopted`, when set, is the absolute prefix of a
    token file that is used where it is, and then holds instead. Use `token_prefix`. n_documents: items in the file,
    duplication included. n_source_documents: documents in the input, those held out included. n_trained: tokens that
    are trained on, which `train.mask` marks; None where it is all of them, and there is no such file. files: by name,
    of this directory or beside `adopted`. packing: None where samples are slices of one stream. options: the settings
    that decide the content.
    """

    version: Literal[1]
    name: PlainName
    prefix: PlainName
    adopted: str | None = None
    n_tokens: Count
    n_documents: Count
    n_source_documents: Count
    n_empty_documents: Count = 0
    n_bad_lines: Count = 0
    n_trained: Count | None = None
    dtype: Literal["uint8", "int8", "int16", "uint16", "int32", "int64"]
    vocab_size: Annotated[int, Field(ge=1, lt=2**63)]
    files: dict[PlainName, FileRecord]
    validation: ValidationRecord | None = None
    packing: PackingRecord | None = None
    tokenizer: dict[str, Any]
    options: dict[str, Any]
    n_sources: Count
    source_digest: Sha256

    @model_validator(mode="after")
    def _names_its_files(self) -> DataManifest:
        if self.adopted is not None and (not os.path.isabs(self.adopted) or ".." in Path(self.adopted).parts):
            raise ValueError("adopted is not an absolute path")
        needed = _token_files(self.prefix, self.n_trained, self.packing)
        if self.validation:
            needed |= _token_files(VALIDATION, self.validation.n_trained, self.validation.packing)
        if missing := sorted(needed - set(self.files)):
            raise ValueError(f"files lacks {', '.join(missing)}")
        return self

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the training tokens, mask, windows, dtype or the vocabulary size."""
        suffixes = _suffixes(self.n_trained, self.packing)
        content = [self.files[f"{self.prefix}.{suffix}"].sha256 for suffix in suffixes]
        return hashlib.sha256(_canonical([content, self.dtype, self.vocab_size])).hexdigest()[:16]

    def token_prefix(self, out_dir: Path) -> Path:
        """Prefix of the training token file of the prepared directory `out_dir`."""
        return Path(self.adopted) if self.adopted is not None else Path(out_dir) / self.prefix

    def validation_prefix(self, out_dir: Path) -> Path | None:
        """Prefix of the held-out token file, or None."""
        return Path(out_dir) / VALIDATION if self.validation else None

    @property
    def samples_in_words(self) -> str | None:
        """What is trained on and how documents are packed; None for one stream of which everything is."""
        trained = [] if self.n_trained is None else [f"{self.n_trained:,} of {self.n_tokens:,} tokens trained on"]
        packed = [] if self.packing is None else [self.packing.in_words()]
        return "; ".join(trained + packed) or None

    @property
    def validation_files(self) -> list[str]:
        """Those of `files` that an evaluation reads."""
        return [name for name in self.files if name.startswith(f"{VALIDATION}.")]

    @property
    def run_files(self) -> list[str]:
        """Those of `files` that a run reads: without the documents as JSONL."""
        return [name for name in self.files if not name.endswith(".jsonl")]

    def path_of(self, out_dir: Path, file_name: str) -> Path:
        """Where a file of `files` lies."""
        of_tokens = file_name in (f"{self.prefix}.bin", f"{self.prefix}.idx")
        if self.adopted is not None and of_tokens:
            return Path(f"{self.adopted}{Path(file_name).suffix}")
        return Path(out_dir) / file_name

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        record = self.model_dump()
        for part in (record, record["validation"] or {}):
            for name in ("n_trained", "packing"):  # absent, so that plain data has one manifest in every version
                if part.get(name, 0) is None:
                    del part[name]
        return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


def is_windows(file_name: str) -> bool:
    """Whether a file of a manifest holds packed windows."""
    return file_name.endswith((".windows.bin", ".windows.idx"))


def _suffixes(n_trained: int | None, packing: PackingRecord | None) -> list[str]:
    """Endings of a token file's parts."""
    masks = [] if n_trained is None else ["mask"]
    windows = [] if packing is None else ["windows.bin", "windows.idx"]
    return ["bin", "idx", *masks, *windows]


def _token_files(prefix: str, n_trained: int | None, packing: PackingRecord | None) -> set[str]:
    return {f"{prefix}.{suffix}" for suffix in _suffixes(n_trained, packing)}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def check_name(name: str) -> str:
    """`name` when it can be the name of prepared data; DataError otherwise (no separators, no leading dot or dash)."""
    if not re.fullmatch(_NAME, name):
        raise DataError(
            f"data name {name!r} cannot be a file name here", remedy="Use letters, digits, '.', '_' and '-'"
        )
    return name


def load_manifest(out_dir: str | Path, *, verify: bool = False) -> DataManifest:
    """Manifest of a prepared directory, after checking that its files are there with the sizes it says.

    verify: also read every file and compare its sha256. Raises MissingDataError or DataError.
    """
    directory = Path(out_dir)
    manifest = parse_manifest(_read(directory / DATA_MANIFEST), directory / DATA_MANIFEST)
    for name, record in manifest.files.items():
        path = manifest.path_of(directory, name)
        _check_file(path, record, verify, may_link=path.parent != directory)
    return manifest


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=open_own) as handle:
            content = handle.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise MissingDataError(
            f"{path} does not exist: the data is not prepared", remedy="Run `rwkv-cluster prepare CONFIG`"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", remedy="Prepare the data again") from error
    if len(content) > _MAX_BYTES:
        raise DataError(
            f"{path} has more than {_MAX_BYTES} bytes and cannot be a manifest", remedy="Prepare the data again"
        )
    return content


def parse_manifest(content: bytes, path: Path) -> DataManifest:
    """DataManifest from the bytes of a manifest.json. Raises DataError naming `path` and the fault."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({str(error)[:100]})", remedy="Prepare the data again") from None
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise DataError(
            f"{path} has manifest version {str(version)[:40]}, expected {VERSION}", remedy="Prepare the data again"
        )
    try:
        return DataManifest.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"]) or "its fields"
        raise DataError(f"{path}: {place}: {first['msg']}", remedy="Prepare the data again") from None


def _check_file(path: Path, record: FileRecord, verify: bool, may_link: bool) -> None:
    try:
        status = os.stat(path, follow_symlinks=may_link)
    except OSError as error:
        raise MissingDataError(
            f"{path}, which the manifest lists: {error.strerror}", remedy="Prepare the data again"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}, which the manifest lists, is not a regular file", remedy="Prepare the data again")
    if status.st_size != record.bytes:
        raise DataError(
            f"{path} has {status.st_size} bytes, but the manifest says {record.bytes}. It was changed or cut",
            remedy="Prepare the data again",
        )
    if verify and sha256_file(path) != record.sha256:
        raise DataError(
            f"{path} is not the file that was prepared: its sha256 differs", remedy="Prepare the data again"
        )
