"""What can be said of checkpoints without torch: which there are, what their manifests name, whether the bytes fit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.countdown import bytes_left
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.own_file import read_own, require_own
from rwkv_cluster.workdir import sha256_file

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint as its manifest describes it. n_bytes: of all files; files: names of all but the manifest."""

    path: Path
    step: int
    n_bytes: int
    state: dict[str, Any]
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
    manifest_path = path / MANIFEST
    body = _read_manifest(manifest_path)
    n_bytes = sum(entry["bytes"] for entry in body["files"].values())
    with bytes_left(f"verifying {path.name}", n_bytes) as left:
        for name, entry in body["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{manifest_path}: it names {name!r}, which is not a file of this directory")
            _check_file(path / name, **entry, checksum=checksums or name == STATE, advance=left.advance)
    return CheckpointFiles(path, body["step"], n_bytes, json.loads(read_own(path / STATE)), tuple(body["files"]))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = read_own(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    text, _, _ = content.rstrip(b"\n").rpartition(b"\n")
    if content != text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path}: its own sha256 does not fit; it was altered or cut short")
    body: dict[str, Any] = json.loads(text)
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {body['format']}, this version reads {FORMAT}")
    if path.parent.name != checkpoint_path(path.parent, body["step"]).name:
        raise CheckpointError(f"{path}: it belongs to step {body['step']}, not to {path.parent.name}")
    return body


def _check_file(path: Path, *, bytes: int, sha256: str, checksum: bool, advance: Callable[[int], None]) -> None:
    try:
        require_own(path)
        found = path.stat().st_size
        if found != bytes:
            raise CheckpointError(f"{path}: {found} bytes, expected {bytes}")
        if checksum and sha256_file(path, advance) != sha256:
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
