"""A step made durable: directories `step-XXXXXXXX` that exist whole and verified, or not at all.

    weights.pth      fp32 master weights, RWKV-LM's names
    optimizer.pth    Adam's moments, `<moment>/<parameter name>`
    state.json       step, tokens seen, random states of every rank, the configuration, the data's fingerprint
    manifest.json    size and sha256 of each of these, and of itself

A checkpoint is filled under a temporary name and renamed when all of it is on the disk. Reading starts with the
manifest: torch's own loader accepts most flipped bits in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from rwkv_cluster.workdir import TEMPORARY_PREFIX, atomic_directory, fsync_directory, sha256_file

log = logging.getLogger("rwkv_cluster")

FORMAT = 1
MANIFEST = "manifest.json"
PAYLOAD = ("weights.pth", "optimizer.pth", "state.json")
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is state.json; tensors are read on demand."""

    path: Path
    step: int
    state: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        return load_pth(self.path / "weights.pth")

    def optimizer(self) -> dict[str, Tensor]:
        return load_pth(self.path / "optimizer.pth")


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Steps for which a checkpoint directory exists, ascending by number. Nothing is verified."""
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def save(
    directory: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Commit a checkpoint of `step`, replacing one that a damaged earlier attempt left under the same name.

    Raises CheckpointError when a value is not finite or the disk refuses; the previous checkpoint is untouched.
    """
    for tensors in (weights, optimizer):
        check_finite(tensors, f"the checkpoint of step {step} is not written")
    path = checkpoint_path(directory, step)
    try:
        _remove(path)
        with atomic_directory(path) as temporary:
            torch.save(dict(weights), temporary / "weights.pth")
            fault_point("checkpoint.after_weights", step=step)
            torch.save(dict(optimizer), temporary / "optimizer.pth")
            fault_point("checkpoint.after_optimizer", step=step)
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            fault_point("checkpoint.before_manifest", step=step)
            (temporary / MANIFEST).write_bytes(_manifest_bytes(temporary, step))
            fault_point("checkpoint.before_commit", step=step)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        free = shutil.disk_usage(directory).free
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values()))
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {error}. It needs about {needed:,} bytes and {free:,} are free "
            f"on {directory}. Make room and run the same command again"
        ) from error
    fault_point("checkpoint.after_commit", step=step)
    return path


def _manifest_bytes(directory: Path, step: int) -> bytes:
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)} for name in PAYLOAD
    }
    return _canonical({"format": FORMAT, "step": step, "files": files})


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
    for name in PAYLOAD:
        _verify_file(path / name, **body["files"][name])
    return Checkpoint(path, body["step"], json.loads((path / "state.json").read_text()))


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


def prune(directory: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints. A name vanishes at once, before its content does."""
    for step in list_steps(directory)[:-keep_last]:
        _remove(checkpoint_path(directory, step))


def _remove(path: Path) -> None:
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        path.rename(doomed)
        fsync_directory(path.parent)
        shutil.rmtree(doomed)
