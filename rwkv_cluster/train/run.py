"""The story of a run: take the work directory, get the data, start or continue, train to the end, leave the results."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import Config
from rwkv_cluster.data.prepare import DataManifest, load_manifest, prepare, reason_to_prepare
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.ranks import end_with_launcher, launched_world_size, rank
from rwkv_cluster.tokenizer import build_tokenizer
from rwkv_cluster.train import checkpoint, distributed, resume
from rwkv_cluster.train.attendance import Attendance
from rwkv_cluster.train.fit import TrainResult, fit
from rwkv_cluster.train.log_file import log_file
from rwkv_cluster.train.loggers import require_packages
from rwkv_cluster.train.rollcall import RollCall
from rwkv_cluster.train.sample import require_sample_prompt
from rwkv_cluster.train.session import Session, ensure_init_file, open_session, resolve
from rwkv_cluster.train.signals import StopRequest
from rwkv_cluster.train.vocabulary_size import with_vocabulary
from rwkv_cluster.workdir import WorkDir, remove_temporaries

__all__ = ["TrainResult", "initialize", "prepare_data", "train"]

log = logging.getLogger("rwkv_cluster")

SHARED_DIRECTORY_S = 120.0  # for what one machine has written to be seen on another


def prepare_data(
    config: Config, *, tokenizer: Any = None, arrays: Sequence[np.ndarray] = (), name: str = "train"
) -> DataManifest:
    """Prepare `<work_dir>/data` without training. Raises DataError, or LaunchError when a run holds the directory.

    tokenizer, arrays: objects to use instead of, and in addition to, what config.data names.
    """
    work = WorkDir(config.work_dir)
    with _holding(config, work) as roll_call:
        return _obtain_data(config, work, roll_call, _chosen(tokenizer, config), arrays, name)


def initialize(config: Config, *, force: bool = False, tokenizer: Any = None) -> Path:
    """Write out/rwkv-init.pth (replacing an existing one with `force`) and return its path."""
    work = WorkDir(config.work_dir)
    vocab_size = _chosen(tokenizer, config).vocab_size
    with _holding(config, work):
        return ensure_init_file(with_vocabulary(config, vocab_size), work, force=force)


def train(config: Config, *, tokenizer: Any = None, manifest: DataManifest | None = None) -> TrainResult:
    """Run or continue the run that `config` describes; the same call again continues where the last one ended.

    tokenizer: object to use instead of what config.data.tokenizer names. manifest: data that is prepared already.

    Raises:
        ConfigError, DataError, CheckpointError: the run cannot start as described; nothing was changed.
        LaunchError: another run holds the work directory.
        TrainingError: the loss or a gradient is no longer finite.
        Preempted: a signal or a STOP file ended the run after a checkpoint.
    """
    end_with_launcher()
    work = WorkDir(config.work_dir)
    tokenizer = _chosen(tokenizer, config)
    require_packages(config.logging)
    require_sample_prompt(config.logging, tokenizer)
    resolve(config, int(tokenizer.vocab_size))  # refuses before the data is prepared what would be refused after it
    with _holding(config, work) as roll_call:
        session = open_session(config, work, manifest or _obtain_data(config, work, roll_call, tokenizer))
        if session.is_complete:
            return _already_complete(session)
        log_path = work.train_log if rank() == 0 else None
        with StopRequest(work.root / "STOP").listening() as stop_request, log_file(log_path):
            return fit(session, tokenizer, stop_request, [Attendance(roll_call)], roll_call.do)


def _chosen(tokenizer: Any, config: Config) -> Any:
    return build_tokenizer(config.data.tokenizer) if tokenizer is None else tokenizer


@contextmanager
def _holding(config: Config, work: WorkDir) -> Iterator[RollCall]:
    """The work directory, created and locked by rank 0 for all ranks, which see each other inside the block."""
    world_size = launched_world_size() or config.training.devices
    timeout_s = config.training.timeout_s
    roll_call = RollCall(work, world_size, timeout_s, config.guard.hang_timeout_s or timeout_s / 2)
    with roll_call.answering():
        if rank() != 0:
            yield roll_call
            return
        work.create()
        with work.lock():
            roll_call.forget_earlier_runs()
            for folder in (work.out, work.checkpoints, work.logs, work.rank_events, work.profile, work.configs):
                remove_temporaries(folder)
            (work.root / "STOP").unlink(missing_ok=True)
            yield roll_call


def _obtain_data(
    config: Config,
    work: WorkDir,
    roll_call: RollCall,
    tokenizer: Any,
    arrays: Sequence[np.ndarray] = (),
    name: str = "train",
) -> DataManifest:
    """Rank 0 prepares; the others wait for its word, and for the files to be seen here. No collective meanwhile."""
    if rank() != 0:
        fingerprint = roll_call.wait_for_rank_0("data", what="the preparation of the data")
        return _manifest_seen_here(work, fingerprint)
    manifest = _prepared_by_rank_0(config, work, tokenizer, arrays, name)
    roll_call.publish(data=manifest.fingerprint)
    return manifest


def _prepared_by_rank_0(
    config: Config, work: WorkDir, tokenizer: Any, arrays: Sequence[np.ndarray], name: str
) -> DataManifest:
    if not config.data.inputs and not arrays:
        try:
            return load_manifest(work.data)
        except MissingDataError as error:
            raise MissingDataError(
                f"data.inputs is empty, and {work.data} holds no prepared data. "
                "Name files, folders or patterns in data.inputs"
            ) from error

    change = reason_to_prepare(config.data, tokenizer, work.data, arrays=arrays, name=name)
    if change is not None:  # otherwise no checkpoint has to be read and hashed for this
        resume.require_unchanged_data(checkpoint.newest_verified(work.checkpoints), change)
    return prepare(config.data, tokenizer, work.data, arrays=arrays, name=name)


def _manifest_seen_here(work: WorkDir, fingerprint: str) -> DataManifest:
    """The manifest that rank 0 has written, once the shared directory shows it to this machine."""

    def look() -> DataManifest | None:
        try:
            found = load_manifest(work.data)
        except DataError:
            return None
        return found if found.fingerprint == fingerprint else None

    what = f"the data that rank 0 has prepared to be seen in {work.data} on this machine"
    return distributed.wait_for(look, what=what, timeout_s=SHARED_DIRECTORY_S)


def _already_complete(session: Session) -> TrainResult:
    assert session.found is not None
    reason, remedy = "complete", "training.num_epochs, max_steps or max_tokens"
    if session.ended_early:
        reason = f"complete, as its validation loss was not below {session.improvement.best} any more,"
        remedy = "training.early_stop_patience"
    log.info("this run is %s at step %d; raise %s to go on", reason, session.start_step, remedy)
    return TrainResult(
        step=session.start_step,
        total_steps=session.horizon.total_steps,
        tokens_seen=session.found.state["tokens_seen"],
        loss=session.found.state["loss"],
        val_loss=session.found.state["val_loss"],
        work_dir=session.work.root,
        final_path=session.work.final_weights,
        already_complete=True,
        ended_early=session.ended_early,
        sample=None,
    )
