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
from rwkv_cluster.errors import MissingDataError
from rwkv_cluster.ranks import end_with_launcher, rank
from rwkv_cluster.tokenizer import build_tokenizer
from rwkv_cluster.train import checkpoint, distributed, resume
from rwkv_cluster.train.fit import TrainResult, fit
from rwkv_cluster.train.loggers import require_packages
from rwkv_cluster.train.sample import require_sample_prompt
from rwkv_cluster.train.session import Session, ensure_init_file, open_session, resolve, with_vocabulary
from rwkv_cluster.train.signals import StopRequest
from rwkv_cluster.workdir import WorkDir, remove_temporaries

__all__ = ["TrainResult", "initialize", "prepare_data", "train"]

log = logging.getLogger("rwkv_cluster")

PREPARATION_TIMEOUT_S = 24 * 3600.0


def prepare_data(
    config: Config, *, tokenizer: Any = None, arrays: Sequence[np.ndarray] = (), name: str = "train"
) -> DataManifest:
    """Prepare `<work_dir>/data` without training. Raises DataError, or LaunchError when a run holds the directory.

    tokenizer, arrays: objects to use instead of, and in addition to, what config.data names.
    """
    work = WorkDir(config.work_dir)
    with _holding(work):
        return _obtain_data(config, work, _chosen(tokenizer, config), arrays, name)


def initialize(config: Config, *, force: bool = False, tokenizer: Any = None) -> Path:
    """Write out/rwkv-init.pth (replacing an existing one with `force`) and return its path."""
    work = WorkDir(config.work_dir)
    vocab_size = _chosen(tokenizer, config).vocab_size
    with _holding(work):
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
    with _holding(work):
        session = open_session(config, work, manifest or _obtain_data(config, work, tokenizer))
        if session.start_step == session.horizon.total_steps:
            return _already_complete(session)
        with StopRequest(work.root / "STOP").listening() as stop_request:
            return fit(session, tokenizer, stop_request)


def _chosen(tokenizer: Any, config: Config) -> Any:
    return build_tokenizer(config.data.tokenizer) if tokenizer is None else tokenizer


@contextmanager
def _holding(work: WorkDir) -> Iterator[None]:
    """The work directory, created and locked by rank 0 for all ranks."""
    if rank() != 0:
        yield
        return
    work.create()
    with work.lock():
        for folder in (work.out, work.checkpoints, work.logs, work.configs):
            remove_temporaries(folder)
        (work.root / "STOP").unlink(missing_ok=True)
        yield


def _obtain_data(
    config: Config, work: WorkDir, tokenizer: Any, arrays: Sequence[np.ndarray] = (), name: str = "train"
) -> DataManifest:
    """Rank 0 prepares; the others wait until what is there fits the configuration. No collective is held meanwhile."""
    if not config.data.inputs and not arrays:
        try:
            return load_manifest(work.data)
        except MissingDataError as error:
            raise MissingDataError(
                f"data.inputs is empty, and {work.data} holds no prepared data. "
                "Name files, folders or patterns in data.inputs"
            ) from error

    def reason() -> str | None:
        return reason_to_prepare(config.data, tokenizer, work.data, arrays=arrays, name=name)

    if rank() == 0:
        change = reason()
        if change is not None:  # otherwise no checkpoint has to be read and hashed for this
            resume.require_unchanged_data(checkpoint.newest_verified(work.checkpoints), change)
        return prepare(config.data, tokenizer, work.data, arrays=arrays, name=name)
    distributed.wait_for(
        lambda: True if reason() is None else None,
        what="rank 0 to prepare the data",
        timeout_s=PREPARATION_TIMEOUT_S,
    )
    return load_manifest(work.data)


def _already_complete(session: Session) -> TrainResult:
    assert session.found is not None
    log.info(
        "this run is complete at step %d; raise training.num_epochs, max_steps or max_tokens to go on",
        session.start_step,
    )
    return TrainResult(
        step=session.start_step,
        total_steps=session.horizon.total_steps,
        tokens_seen=session.found.state["tokens_seen"],
        loss=session.found.state["loss"],
        val_loss=session.found.state["val_loss"],
        work_dir=session.work.root,
        final_path=session.work.final_weights,
        already_complete=True,
        sample=None,
    )
