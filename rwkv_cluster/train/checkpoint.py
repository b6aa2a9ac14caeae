"""A step made durable: directories `step-XXXXXXXX` that exist whole and verified, or not at all.

    weights.pth      fp32 master weights, RWKV-LM's names
    optimizer.pth    Adam's moments, `<moment>/<parameter name>`
    state.json       step, tokens seen, random states of every rank, the configuration, the data's fingerprint
    manifest.json    size and sha256 of each of these, and of itself

Ranks that share the state out among themselves (ZeRO) write `weights-00000-of-00002.pth` and so on, in pieces.

A checkpoint is filled under a temporary name and renamed when all of it is on the disk. Reading starts with the
manifest: torch's own loader accepts most flipped bits in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.state_dict import check_finite, load_pth
from rwkv_cluster.train.distributed import fault_point
from rwkv_cluster.train.pieces import Pieces
from rwkv_cluster.workdir import TEMPORARY_PREFIX, fsync_directory, sha256_file

log = logging.getLogger("rwkv_cluster")

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. state: of state.json. files: names of all but the manifest. Tensors are read on demand."""

    path: Path
    step: int
    state: dict[str, Any]
    files: tuple[str, ...]

    def weights(self) -> dict[str, Tensor] | Pieces:
        """fp32 masters by name. Raises CheckpointError, as `optimizer` does, for a value that is not finite."""
        return self._tensors("weights")

    def optimizer(self) -> dict[str, Tensor] | Pieces:
        """Moments as `<moment>/<name>`."""
        return self._tensors("optimizer")

    def _tensors(self, kind: str) -> dict[str, Tensor] | Pieces:
        if f"{kind}.pth" in self.files:
            tensors = load_pth(self.path / f"{kind}.pth")
            check_finite(tensors, f"{self.path / kind}.pth is not usable")
            return tensors
        names = [name for name in self.files if name.startswith(f"{kind}-")]
        return Pieces([self.path / name for name in names], self.state["shapes"])


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Steps for which a checkpoint directory exists, ascending by number. Nothing is verified."""
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file of a checkpoint durably; returns its entry in the manifest.

    Raises CheckpointError when a value is not finite, OSError or RuntimeError (torch) when the disk refuses.
    """
    check_finite(tensors, f"{path.name} is not written")
    with open(path, "xb") as handle:  # given a name, torch would write by itself and not say why the disk refuses
        torch.save(dict(tensors), handle)
        handle.flush()
        os.fsync(handle.fileno())
    return _entry(path)


def commit(temporary: Path, path: Path, step: int, *, state: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Complete the checkpoint in `temporary` with its state and manifest, and give it its name `path`.

    files: what `write_tensors` returned, by file name.
    """
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    fault_point("checkpoint.before_manifest", step=step)
    entries = {**files, STATE: _entry(temporary / STATE)}
    (temporary / MANIFEST).write_bytes(_canonical({"format": FORMAT, "step": step, "files": entries}))
    for name in (STATE, MANIFEST):
        with open(temporary / name, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(temporary)
    fault_point("checkpoint.before_commit", step=step)
    remove(path)  # one that a damaged earlier attempt has left under the same name
    temporary.rename(path)
    fsync_directory(path.parent)
    fault_point("checkpoint.after_commit", step=step)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _canonical(body: Mapping[str, Any]) -> bytes:
    """The one byte string that stands for `body`: JSON, and a line with the sha256 of that JSON."""
    text = json.dumps(body, indent=1, sort_keys=True).encode()
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def verify(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint. Raises CheckpointError naming the file and what is wrong with it."""
    manifest_path = path / MANIFEST
    try:
        content = manifest_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{manifest_path}: {error.strerror}") from error
    text, _, _ = content.rstrip(b"\n").rpartition(b"\n")
    if content != text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{manifest_path}: its own sha256 does not fit; it was altered or cut short")
    body = json.loads(text)
    if body["format"] != FORMAT:
        raise CheckpointError(f"{manifest_path}: format {body['format']}, this version reads {FORMAT}")
    if path.name != checkpoint_path(path.parent, body["step"]).name:
        raise CheckpointError(f"{manifest_path}: it belongs to step {body['step']}, not to {path.name}")
    for name, entry in body["files"].items():
        if Path(name).name != name:
            raise CheckpointError(f"{manifest_path}: it names {name!r}, which is not a file of this directory")
        _verify_file(path / name, **entry)
    return Checkpoint(path, body["step"], json.loads((path / STATE).read_text()), tuple(body["files"]))


def _verify_file(path: Path, *, bytes: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        if found != bytes:
            raise CheckpointError(f"{path}: {found} bytes, expected {bytes}")
        if sha256_file(path) != sha256:
            raise CheckpointError(f"{path}: its sha256 is not the manifest's; its content was altered")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def newest_verified(directory: Path) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies, or None when there is no checkpoint at all.

    Raises CheckpointError when there are checkpoints and none of them verifies.
    """
    faults: list[str] = []
    for step in reversed(list_steps(directory)):
        try:
            checkpoint = verify(checkpoint_path(directory, step))
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("damaged checkpoint passed over: %s. Step %d is used instead", fault, step)
        return checkpoint
    if faults:
        raise CheckpointError(
            f"none of the {len(faults)} checkpoints in {directory} can be used: {'; '.join(faults)}. "
            "Restore one from a copy, or move the folder away to start from the beginning"
        )
    return None


def prune(directory: Path, keep_last: int, reach_steps: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints, and those by which one can go back.

    reach_steps: how far, 0 for not at all. Then the first checkpoint is kept of each of the last three stretches of so
    many steps. The newest two stretches can be young both; the third lies back far enough.
    """
    steps = list_steps(directory)
    firsts = {step // reach_steps: step for step in reversed(steps)} if reach_steps else {}
    kept = {firsts[stretch] for stretch in sorted(firsts)[-3:]} | set(steps[-keep_last:])
    for step in steps:
        if step not in kept:
            remove(checkpoint_path(directory, step))


def remove(path: Path) -> None:
    """Delete a checkpoint or part of one, if it is there. Its name vanishes at once, before its content does."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        path.rename(doomed)
        fsync_directory(path.parent)
        shutil.rmtree(doomed)
