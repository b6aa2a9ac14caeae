"""A step made durable: directories `step-XXXXXXXX` that exist whole and verified, or not at all.

    weights.pth      fp32 master weights, RWKV-LM's names
    optimizer.pth    the optimizer's moments, `<moment>/<parameter name>`
    state.json       step, tokens seen, random states of every rank, the configuration, the data's fingerprint
    manifest.json    size and sha256 of each of these, and of itself

Ranks that share the state out among themselves (ZeRO) write `weights-00000-of-00002.pth` and so on, in pieces.

A checkpoint is filled under a temporary name and renamed when all of it is on the disk. Reading starts with the
manifest: torch's own loader accepts most flipped bits in silence.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.weights_file import check_finite, load_pth
from rwkv_cluster.train.checkpoint.files import (
    FORMAT,
    MANIFEST,
    STATE,
    check,
    checkpoint_path,
    entry_of,
    list_steps,
    manifest_bytes,
    newest_good,
)
from rwkv_cluster.train.checkpoint.shards import ShardedTensors
from rwkv_cluster.train.checkpoint.state import CheckpointState
from rwkv_cluster.train.distributed.collectives import fault_point
from rwkv_cluster.workdir import TEMPORARY_PREFIX, fsync_directory

__all__ = ["MANIFEST", "Checkpoint", "checkpoint_path", "list_steps", "newest_verified", "verify"]

log = logging.getLogger("rwkv_cluster")

Files = dict[str, Mapping[str, Tensor]]
"""Tensors by the name of the checkpoint's file that they go to."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. state: of state.json. files: names of all but the manifest. Tensors are read on demand."""

    path: Path
    step: int
    state: CheckpointState
    files: tuple[str, ...]

    def weights(self) -> dict[str, Tensor] | ShardedTensors:
        """fp32 masters by name. Raises CheckpointError, as `optimizer` does, for a value that is not finite."""
        return self._tensors("weights")

    def optimizer(self) -> dict[str, Tensor] | ShardedTensors:
        """Moments as `<moment>/<name>`."""
        return self._tensors("optimizer")

    def _tensors(self, kind: str) -> dict[str, Tensor] | ShardedTensors:
        if f"{kind}.pth" in self.files:
            tensors = load_pth(self.path / f"{kind}.pth", codes=kind == "optimizer")
            check_finite(tensors, f"{self.path / kind}.pth is not usable")
            return tensors
        names = [name for name in self.files if name.startswith(f"{kind}-")]
        assert self.state.shapes is not None
        return ShardedTensors([self.path / name for name in names], self.state.shapes)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file of a checkpoint durably; returns its entry in the manifest.

    Raises CheckpointError when a value is not finite, OSError or RuntimeError (torch) when the disk refuses.
    """
    check_finite(tensors, f"{path.name} is not written")
    with open(path, "xb") as handle:  # given a name, torch would write by itself and not say why the disk refuses
        torch.save(dict(tensors), handle)
        handle.flush()
        os.fsync(handle.fileno())
    return entry_of(path)


def commit(temporary: Path, path: Path, step: int, *, state: CheckpointState, files: Mapping[str, Any]) -> None:
    """Complete the checkpoint in `temporary` with its state and manifest, and give it its name `path`.

    files: what `write_tensors` returned, by file name.
    """
    (temporary / STATE).write_text(state.to_json())
    fault_point("checkpoint.before_manifest", step=step)
    entries = {**files, STATE: entry_of(temporary / STATE)}
    (temporary / MANIFEST).write_bytes(manifest_bytes({"format": FORMAT, "step": step, "files": entries}))
    for name in (STATE, MANIFEST):
        with open(temporary / name, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(temporary)
    fault_point("checkpoint.before_commit", step=step)
    remove(path)  # one that a damaged earlier attempt has left under the same name
    temporary.rename(path)
    fsync_directory(path.parent)
    fault_point("checkpoint.after_commit", step=step)


def verify(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint. Raises CheckpointError naming the file and what is wrong with it."""
    checked = check(path)
    return Checkpoint(path, checked.step, checked.state, checked.files)


def newest_verified(directory: Path) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies, or None when there is no checkpoint at all.

    Raises CheckpointError when there are checkpoints and none of them verifies.
    """
    newest, faults = newest_good(directory)
    if newest is not None:
        for fault in faults:
            log.warning("damaged checkpoint passed over: %s. Step %d is used instead", fault, newest.step)
        return Checkpoint(newest.path, newest.step, newest.state, newest.files)
    if faults:
        raise CheckpointError(
            f"none of the {len(faults)} checkpoints in {directory} can be used: {'; '.join(faults)}",
            remedy="Restore one from a copy, or move the folder away to start from the beginning",
        )
    return None


def remove(path: Path) -> None:
    """Delete a checkpoint or part of one, if it is there. Its name vanishes at once, before its content does."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        path.rename(doomed)
        fsync_directory(path.parent)
        shutil.rmtree(doomed)
