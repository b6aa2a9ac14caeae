"""The story of a run: take the work directory, get the data, start or continue, train to the end, leave the results."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import Config
from rwkv_cluster.config.schema import with_vocabulary
from rwkv_cluster.data.preparation.prepare import (
    DataManifest,
    Earlier,
    load_manifest,
    prepare,
    prepared_before,
    reason_to_prepare,
)
from rwkv_cluster.data.verify import check_files
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.model.weights_file import save_pth
from rwkv_cluster.runtime.rank_env import die_with_launcher, launched, launched_world_size, name_this_launch, rank
from rwkv_cluster.tokenizer import build_tokenizer
from rwkv_cluster.train.callbacks.rank_status import RankStatusCallback
from rwkv_cluster.train.checkpoint import resume, save_load
from rwkv_cluster.train.checkpoint.initial_weights import with_sizes_of_weights
from rwkv_cluster.train.checkpoint.weights import final_weights
from rwkv_cluster.train.distributed.rank_monitor import RankMonitor
from rwkv_cluster.train.distributed.rank_record import SessionStart
from rwkv_cluster.train.fit import TrainResult, fit
from rwkv_cluster.train.foreign_files import require_no_foreign_files
from rwkv_cluster.train.guards.stop_request import StopRequest
from rwkv_cluster.train.metrics.console_log import log_file
from rwkv_cluster.train.metrics.loggers import require_packages
from rwkv_cluster.train.parallel.strategy import require_script
from rwkv_cluster.train.placement import DTYPES
from rwkv_cluster.train.sample import require_sample_prompt
from rwkv_cluster.train.session import Session, ensure_init_file, open_session, require_init_from, resolve
from rwkv_cluster.train.wait_for_rank_0 import manifest_seen_here, once_each, session_of_rank_0, stamp_of
from rwkv_cluster.workdir import WorkDir, remove_temporaries

__all__ = ["TrainResult", "initialize", "prepare_data", "train"]

log = logging.getLogger("rwkv_cluster")

_calls: Counter[tuple[str, Path]] = Counter()  # all ranks make the same calls, and so agree on which one is which


def prepare_data(
    config: Config, *, tokenizer: Any = None, arrays: Sequence[np.ndarray] = (), name: str = "train"
) -> DataManifest:
    """Prepare `<work_dir>/data` without training. Raises DataError, or LaunchError when a run holds the directory.

    tokenizer, arrays: objects to use instead of, and in addition to, what config.data names. On several ranks rank 0
    prepares; the others return when it has, or when what is there is what they would prepare.
    """
    die_with_launcher()
    work = WorkDir(config.work_dir)
    tokenizer = _chosen(tokenizer, config)
    with _holding(config, work, "prepare") as rank_monitor:
        if rank() == 0:
            manifest = _prepared(config, work, tokenizer, arrays, name, mend=True)
            rank_monitor.write(data=manifest.fingerprint)
            return manifest

        def is_prepared() -> bool:
            if not config.data.inputs and not arrays:
                return _is_prepared(work)
            try:
                return (
                    reason_to_prepare(
                        config.data, tokenizer, work.data, arrays=arrays, name=name, ctx_len=config.model.ctx_len
                    )
                    is None
                )
            except MissingDataError:
                return (
                    prepared_before(config.data, tokenizer, work.data, name=name, ctx_len=config.model.ctx_len)
                    is not None
                )

        what = "the preparation of the data"
        is_there = once_each(lambda: stamp_of(work.data_manifest), is_prepared)
        fingerprint = rank_monitor.wait_for_rank_0(lambda record: record.data, what=what, is_there=is_there)
        return load_manifest(work.data) if fingerprint is None else manifest_seen_here(work, fingerprint)


def initialize(config: Config, *, force: bool = False, tokenizer: Any = None) -> Path:
    """Write out/rwkv-init.pth (replacing an existing one with `force`) and return its path. Rank 0 does it for all."""
    die_with_launcher()
    work = WorkDir(config.work_dir)
    vocab_size = _chosen(tokenizer, config).vocab_size
    with _holding(config, work, "initialize") as rank_monitor:
        if rank() == 0:
            sized = with_sizes_of_weights(config, vocab_size)
            ensure_init_file(with_vocabulary(sized, vocab_size), work, force=force)
            rank_monitor.write(initialized=True)
        else:
            what = "the initial weights"
            rank_monitor.wait_for_rank_0(
                lambda record: record.initialized, what=what, is_there=work.initial_weights.exists
            )
        return work.initial_weights


def train(config: Config, *, tokenizer: Any = None, manifest: DataManifest | None = None) -> TrainResult:
    """Run or continue the run that `config` describes; the same call again continues where the last one ended.

    tokenizer: object to use instead of what config.data.tokenizer names. manifest: data that is prepared already.

    Raises:
        ConfigError, DataError, CheckpointError: the run cannot start as described; nothing was changed.
        LaunchError: another run holds the work directory.
        TrainingError: the loss or a gradient is no longer finite.
        Preempted: a signal or a STOP file ended the run after a checkpoint.
    """
    die_with_launcher()
    work = WorkDir(config.work_dir)
    tokenizer = _chosen(tokenizer, config)
    require_packages(config.logging)
    require_sample_prompt(config.logging, tokenizer)
    require_script(config.training)
    vocab_size = int(tokenizer.vocab_size)
    resolve(config, vocab_size)  # refuses at once what would be refused after the data
    with _holding(config, work, "train") as rank_monitor:
        if rank() == 0:
            config = with_sizes_of_weights(config, vocab_size)
            require_init_from(resolve(config, vocab_size)[0], work)
            prepared = _verified(manifest, work) if manifest else _prepared(config, work, tokenizer)
            session = open_session(config, work, prepared)
            begins = SessionStart(
                data=prepared.fingerprint,
                step=session.start_step,
                group=session.group,
                model=session.config.model.model_dump(mode="json"),
                grad_cp=int(session.config.training.grad_cp),
            )
            rank_monitor.write(begins=begins)
        else:
            session = session_of_rank_0(config, work, rank_monitor)
        if session.is_complete:
            return _already_complete(session)
        log_path = work.train_log if rank() == 0 else None
        with StopRequest(work.stop_file).listening() as stop_request, log_file(log_path):
            return fit(session, tokenizer, stop_request, [RankStatusCallback(rank_monitor)], rank_monitor.set_activity)


def _chosen(tokenizer: Any, config: Config) -> Any:
    return build_tokenizer(config.data.tokenizer) if tokenizer is None else tokenizer


@contextmanager
def _holding(config: Config, work: WorkDir, action: str) -> Iterator[RankMonitor]:
    """The work directory, created and locked by rank 0 for all ranks, which see each other inside the block."""
    world_size = launched_world_size() or config.training.devices
    if world_size > 1 and not launched():
        name_this_launch()
    _calls[action, work.root] += 1
    session = f"{action} {_calls[action, work.root]}"
    timeout_s = config.training.timeout_s
    rank_monitor = RankMonitor(work, world_size, timeout_s, config.guard.hang_timeout_s or timeout_s / 2, session)
    with rank_monitor.running():
        if rank() != 0:
            yield rank_monitor
            return
        require_no_foreign_files(work, config.data.inputs, config.training.init_from)
        work.create()
        with work.lock():
            rank_monitor.forget_earlier_runs()
            for folder in (work.out, work.checkpoints, work.logs, work.step_times, work.profile, work.configs):
                remove_temporaries(folder)
            work.stop_file.unlink(missing_ok=True)
            yield rank_monitor


def _prepared(
    config: Config,
    work: WorkDir,
    tokenizer: Any,
    arrays: Sequence[np.ndarray] = (),
    name: str = "train",
    *,
    mend: bool = False,
) -> DataManifest:
    if not config.data.inputs and not arrays:
        try:
            return _verified(load_manifest(work.data), work)
        except MissingDataError as error:
            raise MissingDataError(
                f"data.inputs is empty, and {work.data} holds no prepared data",
                remedy="Name files, folders or patterns in data.inputs",
            ) from error

    try:
        change = reason_to_prepare(
            config.data, tokenizer, work.data, arrays=arrays, name=name, ctx_len=config.model.ctx_len
        )
    except MissingDataError as error:
        return _without_inputs(config, work, tokenizer, name, error)
    fingerprint = None
    if change is not None and work.parent.exists():
        raise DataError(
            f"the data has to be prepared anew ({change}), but {work.data} is that of the run that this one has "
            "branched off",
            remedy="Put the inputs and data settings back, or go on with the data that is there by --data.inputs=[]; "
            "other data needs a new work_dir, with training.init_from",
        )
    if change is not None:  # otherwise no checkpoint has to be read and hashed for this
        checkpoint = save_load.newest_verified(work.checkpoints)
        if _is_prepared(work):
            resume.require_unchanged_data(checkpoint, change)
        elif checkpoint is not None:
            fingerprint = checkpoint.state.data_fingerprint
    return prepare(
        config.data,
        tokenizer,
        work.data,
        arrays=arrays,
        name=name,
        ctx_len=config.model.ctx_len,
        earlier=Earlier(mend, fingerprint),
    )


def _verified(manifest: DataManifest, work: WorkDir) -> DataManifest:
    check_files(manifest, work.data, manifest.run_files)
    return manifest


def _without_inputs(config: Config, work: WorkDir, tokenizer: Any, name: str, error: MissingDataError) -> DataManifest:
    """The data that was prepared from inputs that are gone. Raises `error` where it was prepared from others."""
    manifest = prepared_before(config.data, tokenizer, work.data, name=name, ctx_len=config.model.ctx_len)
    if manifest is not None:
        log.warning("%s. Going on with the data that was prepared from it, in %s", error, work.data)
        return _verified(manifest, work)
    if _is_prepared(work):
        raise MissingDataError(
            f"{error}", remedy=f"Or go on with the data that is prepared in {work.data}: --data.inputs=[]"
        ) from error
    raise error


def _is_prepared(work: WorkDir) -> bool:
    try:
        load_manifest(work.data)
    except DataError:
        return False
    return True


def _already_complete(session: Session) -> TrainResult:
    checkpoint, path = session.resume_checkpoint, session.work.final_weights
    assert checkpoint is not None
    reason, remedy = "complete", "training.num_epochs, max_steps or max_tokens"
    if session.ended_early:
        reason = f"complete, as its validation loss was not below {session.improvement.best} any more,"
        remedy = "training.early_stop_patience"
    log.info("this run is %s at step %d; raise %s to go on", reason, session.start_step, remedy)
    if rank() == 0 and not path.exists():
        log.info("%s was gone and is written again, from %s", path, checkpoint.path)
        save_pth(path, final_weights(checkpoint, session.work, DTYPES[session.config.training.precision]))
    return TrainResult(
        step=session.start_step,
        total_steps=session.horizon.total_steps,
        tokens_seen=checkpoint.state.tokens_seen,
        loss=checkpoint.state.loss,
        val_loss=checkpoint.state.val_loss,
        work_dir=session.work.root,
        final_path=path,
        already_complete=True,
        ended_early=session.ended_early,
        sample=None,
    )
