"""What can be said of checkpoints without torch: which there are, what their manifests name, whether the bytes fit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.runtime.counts import Count
from rwkv_cluster.runtime.own_file import read_own, require_own
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.train.checkpoint.state import CheckpointState
from rwkv_cluster.workdir import sha256_file

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_WHOLE = frozenset({"weights.pth", "optimizer.pth", STATE})
_SHARD = re.compile(r"(?:weights|optimizer)-\d{5}-of-(\d{5})\.pth")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _FileEntry(_Part):
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(_Part):
    format: Literal[1]
    step: Count
    files: dict[str, _FileEntry]


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint as its manifest describes it. n_bytes: of all files; files: names of all but the manifest."""

    path: Path
    step: int
    n_bytes: int
    state: CheckpointState
    files: tuple[str, ...]


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Steps for which a checkpoint directory exists, ascending by number. Nothing is verified."""
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def entry_of(path: Path) -> dict[str, Any]:
    """A file's line in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The one byte string that stands for `body`: JSON, and a line with the sha256 of that JSON."""
    text = json.dumps(body, indent=1, sort_keys=True).encode()
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def check(path: Path, *, checksums: bool = True) -> CheckpointFiles:
    """Compare a checkpoint with its manifest. Raises CheckpointError naming the file and what is wrong with it.

    checksums: read every byte. Without, only the manifest and state.json are read, and of the others the sizes seen.
    """
    manifest = _read_manifest(path / MANIFEST)
    n_bytes = sum(entry.bytes for entry in manifest.files.values())
    with bytes_left(f"verifying {path.name}", n_bytes) as left:
        for name, entry in manifest.files.items():
            _check_file(path / name, entry, checksum=checksums or name == STATE, advance=left.advance)
    state = _read_state(path / STATE, manifest)
    return CheckpointFiles(path, manifest.step, n_bytes, state, tuple(manifest.files))


def _read_manifest(path: Path) -> _Manifest:
    try:
        content = read_own(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    text, _, _ = content.rstrip(b"\n").rpartition(b"\n")
    if content != text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path}: its own sha256 does not fit; it was altered or cut short")
    body = _parse(text, path)
    version = body.get("format") if isinstance(body, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise CheckpointError(f"{path}: format {version!s:.40}, this version reads {FORMAT}")
    with _naming_the_field(path):
        manifest = _Manifest.model_validate(body)
    if path.parent.name != checkpoint_path(path.parent, manifest.step).name:
        raise CheckpointError(f"{path}: it belongs to step {manifest.step}, not to {path.parent.name}")
    _require_all_files(path, set(manifest.files))
    return manifest


def _require_all_files(path: Path, names: set[str]) -> None:
    """One rank's whole tensors, or the shards of each of n ranks, and the state. Raises CheckpointError."""
    counts = {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}
    kinds, n_ranks = ("weights", "optimizer"), max(counts, default=0)
    shards = {f"{kind}-{rank:05d}-of-{n_ranks:05d}.pth" for kind in kinds for rank in range(n_ranks)}
    required = shards | {STATE} if shards else _WHOLE
    if missing := sorted(required - names):
        raise CheckpointError(f"{path}: it does not list {missing[0]}, without which the checkpoint is not whole")
    if strange := sorted(names - required):
        raise CheckpointError(f"{path}: it lists {strange[0]!r:.80}, which is no file of such a checkpoint")


def _read_state(path: Path, manifest: _Manifest) -> CheckpointState:
    try:
        content = read_own(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    with _naming_the_field(path):
        state = CheckpointState.from_json(content)
    if state.step != manifest.step:
        raise CheckpointError(f"{path}: it belongs to step {state.step}, the manifest to step {manifest.step}")
    if state.shapes is None and "weights.pth" not in manifest.files:
        raise CheckpointError(f"{path}: shapes: there are none, which files in shards need")
    return state


def _parse(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is not JSON ({error!s:.80})") from None


@contextmanager
def _naming_the_field(path: Path) -> Iterator[None]:
    """Raises CheckpointError that names the first field that is wrong, in place of pydantic's ValidationError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"]) or "as a whole"
        raise CheckpointError(
            f"{path}: {place}: {first['msg']}", remedy="It was written by another version, or altered"
        ) from None


def _check_file(path: Path, entry: _FileEntry, *, checksum: bool, advance: Callable[[int], None]) -> None:
    try:
        require_own(path)
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{path}: {size} bytes, expected {entry.bytes}")
        if checksum and sha256_file(path, advance) != entry.sha256:
            raise CheckpointError(f"{path}: its sha256 is not the manifest's; its content was altered")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def newest_good(directory: Path, *, checksums: bool = True) -> tuple[CheckpointFiles | None, list[str]]:
    """The checkpoint of the highest step with which nothing is wrong, and what is wrong with those above it."""
    faults: list[str] = []
    for step in reversed(list_steps(directory)):
        try:
            return check(checkpoint_path(directory, step), checksums=checksums), faults
        except CheckpointError as error:
            faults.append(str(error))
    return None, faults
