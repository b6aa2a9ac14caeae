"""Check that a configuration may resume a checkpoint: compare the fields that would change the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwkv_cluster.config import AdapterConfig, Config, TrainingConfig
from rwkv_cluster.data.batch_size import divisors, listing
from rwkv_cluster.errors import CheckpointError, ConfigError, DataError
from rwkv_cluster.interchange.read import read_weights
from rwkv_cluster.model.parameter_shapes import unused_names
from rwkv_cluster.train.checkpoint.save_load import Checkpoint
from rwkv_cluster.train.checkpoint.state import RunIdentity

log = logging.getLogger("rwkv_cluster")

_FREE_SECTIONS = ("checkpoint", "guard", "logging")
DEFAULTS = {"adapter": AdapterConfig().model_dump(mode="json")}
"""Sections that checkpoints of earlier versions lack."""


def accumulation_of(checkpoint: Checkpoint, training: TrainingConfig, world_size: int) -> int | None:
    """Micro batches per optimizer step with which another number of ranks has `checkpoint`'s global batch.

    None where the number of ranks is the same, or the configuration says something new about the batch itself. Raises
    ConfigError, with numbers that would do, where the global batch cannot be kept.
    """
    before = checkpoint.state.config["training"]
    fields = ("accumulate_grad_batches", "global_batch_size")
    if len(checkpoint.state.random_states) == world_size or any(
        before.get(name) != getattr(training, name) for name in fields
    ):
        return None
    batch = checkpoint.state.global_batch_size
    per_pass = training.micro_bsz * world_size
    if batch % per_pass == 0:
        return batch // per_pass
    worlds = listing([ranks for ranks in divisors(batch) if batch % (training.micro_bsz * ranks) == 0])
    remedies = [f"{worlds} rank{'' if worlds == '1' else 's'}"] if worlds else []
    if batch % world_size == 0:
        remedies.append(f"a training.micro_bsz of {listing(divisors(batch // world_size))}")
    raise ConfigError(
        f"{checkpoint.path} has a global batch of {batch} samples, which is not a multiple of micro_bsz "
        f"{training.micro_bsz} * {world_size} ranks = {per_pass}",
        remedy=f"Use {', or '.join(remedies)}",
    )


def require_same_run(checkpoint: Checkpoint, identity: RunIdentity, init_weights: Path) -> None:
    """Refuse to continue `checkpoint` with another model (ConfigError), batch (ConfigError) or data (DataError).

    Every difference is listed as `field: old -> new`. Other changes, a learning rate for instance, are logged.
    init_weights: those that the run began with, by which training.init_from is known under another name.
    """
    old, new = checkpoint.state.config, identity.config
    shape = _differences("model", old["model"], new["model"])
    if checkpoint.state.global_batch_size != identity.global_batch_size:
        shape.append(f"global batch size: {checkpoint.state.global_batch_size} -> {identity.global_batch_size}")
    optimizers = old["training"].get("optimizer", "adamw"), new["training"]["optimizer"]
    if optimizers[0] != optimizers[1]:
        shape.append(f"training.optimizer: {optimizers[0]} -> {optimizers[1]}")
    starts = (old["training"].get("init_from"), new["training"]["init_from"])
    if starts[0] != starts[1] and not _is_same_start(*starts, init_weights):
        shape.append(f"training.init_from: {starts[0]} -> {starts[1]}")
    shape += _trained_differences(old, new)
    if identity.base is not None and checkpoint.state.base != identity.base:  # which rank 0 alone has
        shape.append(f"base (fingerprint): {checkpoint.state.base} -> {identity.base}")
    data = [
        f"{label}: {before} -> {now}"
        for label, before, now in (
            ("data (fingerprint)", checkpoint.state.data_fingerprint, identity.data_fingerprint),
            ("magic prime", checkpoint.state.magic_prime, identity.magic_prime),
            ("order", checkpoint.state.order, identity.order),
        )
        if before != now
    ]
    if shape or data:
        kind = ConfigError if shape else DataError
        raise kind(
            f"{checkpoint.path} was trained with other settings: {'; '.join(shape + data)}. "
            "Put them back to continue, or choose another work_dir for a new run"
        )
    defaults = Config().model_dump(mode="json")  # of fields that the version which wrote the checkpoint did not have
    changed = [
        line
        for section in new
        if section not in ("model", "work_dir", *_FREE_SECTIONS)
        for line in _differences(section, {**defaults[section], **old.get(section, {})}, new[section])
    ]
    for line in changed:
        log.warning("continuing step %d with a changed setting: %s", checkpoint.step, line)


def _trained_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is trained otherwise, so that moments and masters of the one run are not those of the other."""
    train = old["training"].get("train", "all"), new["training"]["train"]
    lines = [f"training.train: {train[0]} -> {train[1]}"] if train[0] != train[1] else []
    before, now = {**DEFAULTS["adapter"], **old.get("adapter", {})}, new["adapter"]
    if before["kind"] == now["kind"] == "none":
        return lines
    return lines + _differences("adapter", {**before, "dropout": now["dropout"]}, now)


def _is_same_start(old: str | None, new: str | None, init_weights: Path) -> bool:
    """Whether two names of training.init_from mean one file, or the new one's weights are those of the beginning."""
    if old is None or new is None:
        return False
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    try:
        began, named = (read_weights(path, mapped=True) for path in (init_weights, Path(new)))
    except CheckpointError:
        return False
    return all(
        name in named and named[name].shape == tensor.shape and torch.equal(named[name].to(tensor.dtype), tensor)
        for name, tensor in began.items()
        if name not in unused_names()
    )


def require_unchanged_data(checkpoint: Checkpoint | None, reason: str) -> None:
    """Refuse to prepare data anew under checkpoints that were trained on what is there. Raises DataError."""
    if checkpoint is not None:
        raise DataError(
            f"the data has to be prepared anew ({reason}), but {checkpoint.path} was trained on the data that is there",
            remedy="Put the inputs and data settings back to continue, or go on with the data that is there by "
            "--data.inputs=[]; for a new run choose another work_dir",
        )


def finished_beyond(checkpoint: Checkpoint, total_steps: int) -> None:
    """Raises CheckpointError when a checkpoint lies beyond the run's end."""
    if checkpoint.step > total_steps:
        raise CheckpointError(
            f"{checkpoint.path} is at step {checkpoint.step}, beyond this configuration's last step {total_steps}",
            remedy="Raise training.num_epochs, max_steps or max_tokens, or choose another work_dir",
        )


def _differences(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = []
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            lines += _differences(f"{section}.{key}", old[key], new[key])
        elif old.get(key) != new[key]:
            lines.append(f"{section}.{key}: {old.get(key)} -> {new[key]}")
    return lines
