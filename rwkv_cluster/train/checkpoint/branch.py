"""A branch: a new run that begins at a checkpoint of another, its trunk, without a copy of its data.

    data/                       a link to the trunk's
    out/checkpoints/step-N/     hard links to the trunk's files, or copies on another disk
    out/rwkv-init.pth           likewise, where an adapter or a state is trained: the base, which no checkpoint has
    configs/config.yaml         the trunk's configuration with what is changed
    configs/parent.json         which run it has come from, and where

A checkpoint's files are never written again, only removed, so that a name of its own is all that a branch needs to keep
them when the trunk drops the checkpoint. Torch-free but for the comparison of the two runs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rwkv_cluster.config import Config, TrainingConfig, loader
from rwkv_cluster.config.schema import open_sizes
from rwkv_cluster.data.horizon import horizon
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.data.sampler import SamplePlan, plan_samples
from rwkv_cluster.errors import CheckpointError, ConfigError, MissingCheckpointError
from rwkv_cluster.runtime.counts import Count
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.own_file import open_own, read_own
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.train.checkpoint.files import MANIFEST, CheckpointFiles, check, checkpoint_path, list_steps
from rwkv_cluster.train.checkpoint.state import RunIdentity
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.schedule import learning_rate
from rwkv_cluster.workdir import TEMPORARY_PREFIX, WorkDir, atomic_write, fsync_directory, sha256_file

log = logging.getLogger("rwkv_cluster")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Parent:
    """What a branch says of its trunk, in `configs/parent.json`.

    work_dir: of the trunk, as it was then. manifest_sha256: of the manifest of the checkpoint of `step`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    work_dir: str
    step: Count
    tokens_seen: Count
    manifest_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@cache
def _adapter() -> TypeAdapter[Parent]:
    return TypeAdapter(Parent)


def read_parent(work: WorkDir) -> Parent | None:
    """The trunk of a run; None where it is no branch. Raises CheckpointError for a file that was altered."""
    try:
        return _adapter().validate_json(read_own(work.parent))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it was altered, or written by another version"
        raise CheckpointError(f"{work.parent}: {reason}") from None


def branch(trunk: WorkDir, config: Config, step: int) -> Parent:
    """Make the work directory `config.work_dir`, whole or not at all.

    config: the trunk's with what is changed. Raises ConfigError where the directory is there already, and for another
    model or batch; DataError for other data; CheckpointError where there is no good checkpoint of `step`, or the disk
    refuses.
    """
    new = WorkDir(config.work_dir)
    if os.path.lexists(new.root):
        raise ConfigError(f"{new.root} exists already", remedy="Name a new directory for the branch")
    if step not in (steps := list_steps(trunk.checkpoints)):
        there = ", ".join(map(str, steps)) or "none"
        raise MissingCheckpointError(
            f"{trunk.checkpoints} has no checkpoint of step {step}", remedy=f"Steps that are there: {there}"
        )
    checkpoint = check(checkpoint_path(trunk.checkpoints, step))
    _require_continuation(trunk, config, checkpoint)
    parent = Parent(str(trunk.root), step, checkpoint.state.tokens_seen, sha256_file(checkpoint.path / MANIFEST))
    temporary = WorkDir(new.root.with_name(f"{TEMPORARY_PREFIX}{new.root.name}-{uuid.uuid4().hex[:8]}"))
    with writing(new.root, checkpoint.n_bytes):
        try:
            _fill(temporary, trunk, config, checkpoint, parent)
            os.rename(temporary.root, new.root)
        except BaseException:
            shutil.rmtree(temporary.root, ignore_errors=True)
            raise
        fsync_directory(new.root.parent)
    return parent


def _require_continuation(trunk: WorkDir, config: Config, files: CheckpointFiles) -> None:
    """Refuse what would not continue the checkpoint, as a resume does, and log what it changes."""
    from rwkv_cluster.train.checkpoint import resume  # loads torch
    from rwkv_cluster.train.checkpoint.save_load import Checkpoint

    checkpoint = Checkpoint(files.path, files.step, files.state, files.files)
    manifest, training, sizes = load_manifest(trunk.data), config.training, files.state.config["model"]
    samples = plan_samples(manifest, config.data, config.model.ctx_len, files.state.global_batch_size)
    values = config.model_dump(mode="json")
    values["model"] |= {name: sizes[name] for name in open_sizes(config) if name in sizes}
    identity = RunIdentity(
        values, manifest.fingerprint, samples.global_batch_size, samples.magic_prime, samples.order_name
    )
    resume.require_same_run(checkpoint, identity, trunk.initial_weights)
    resume.finished_beyond(checkpoint, horizon(samples, training).total_steps)
    _tell_jump(TrainingConfig(**files.state.config["training"]), training, samples, files.step)


def _tell_jump(old: TrainingConfig, new: TrainingConfig, samples: SamplePlan, step: int) -> None:
    """Log where the branch's schedule does not go on from the trunk's learning rate."""
    had, has = (
        learning_rate(
            max(step - 1, 0),
            training=training,
            tokens_per_step=samples.tokens_per_step,
            horizon_tokens=horizon(samples, training).tokens,
        )
        for training in (old, new)
    )
    if had != has:
        log.warning("the learning rate of the last step was %.3g, and by the branch's schedule would be %.3g", had, has)


def _fill(new: WorkDir, trunk: WorkDir, config: Config, checkpoint: CheckpointFiles, parent: Parent) -> None:
    """Write everything of a branch below `new`, which does not have its final name yet."""
    for folder in (new.checkpoints, new.logs, new.configs):
        folder.mkdir(parents=True)
    data = os.path.realpath(trunk.data)  # of the first trunk, where this is a branch of a branch
    os.symlink(os.path.relpath(data, os.path.realpath(new.root)), new.data, target_is_directory=True)
    _take_over(checkpoint, checkpoint_path(new.checkpoints, checkpoint.step))
    if config.adapter.kind != "none" and trunk.initial_weights.exists():
        with bytes_left("taking over the base", trunk.initial_weights.stat().st_size) as left:
            _link_or_copy(trunk.initial_weights, new.initial_weights, left.advance)
    atomic_write(new.config_yaml, loader.dump_yaml(config).encode())
    atomic_write(new.config_json, loader.dump_json(config).encode())
    atomic_write(new.parent, (json.dumps(asdict(parent), indent=1) + "\n").encode())
    Events(new.events).add("branch", checkpoint.step, work_dir=parent.work_dir)


def _take_over(checkpoint: CheckpointFiles, folder: Path) -> None:
    """Give the checkpoint's files a second name in `folder`, or copy them where the disk cannot or may not."""
    folder.mkdir()
    with bytes_left(f"taking over {checkpoint.path.name}", checkpoint.n_bytes) as left:
        for name in (MANIFEST, *checkpoint.files):
            source = checkpoint.path / name
            try:
                _link_or_copy(source, folder / name, left.advance)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{source} is gone: the trunk has dropped the checkpoint meanwhile",
                    remedy="Raise checkpoint.keep_last of the trunk, or take a newer step",
                ) from error
    fsync_directory(folder)


def _link_or_copy(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    """Give a file a second name; a copy where the disk cannot or may not. Raises FileNotFoundError where it is gone."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        _copy(source, target, advance)


def _copy(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    with open(source, "rb", opener=open_own) as reader, open(target, "xb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            writer.write(block)
            advance(len(block))
        writer.flush()
        os.fsync(writer.fileno())
