"""One session of training: the parts put together, Lightning's loop run, the outcome told."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback

from rwkv_cluster.adapters.table import STATE
from rwkv_cluster.config import loader
from rwkv_cluster.errors import Interrupted, Preempted
from rwkv_cluster.interchange.state_file import load_state
from rwkv_cluster.model.parameter_shapes import count
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.malloc import keep_freed_memory
from rwkv_cluster.runtime.rank_env import launched, rank, unchanged_environment
from rwkv_cluster.train.callbacks.after_step import AfterStep
from rwkv_cluster.train.callbacks.ddp_fixes import DetachProcessWatcher, StableBuckets
from rwkv_cluster.train.callbacks.network_check import AllReduceCheck
from rwkv_cluster.train.checkpoint.disk_space import bytes_needed_next, require_disk_space
from rwkv_cluster.train.checkpoint.weights import load_model
from rwkv_cluster.train.distributed.collectives import fault_point
from rwkv_cluster.train.guards.spike_guard import Spike
from rwkv_cluster.train.guards.stop_request import StopRequest
from rwkv_cluster.train.memory.out_of_memory import is_out_of_memory, naming_remedy
from rwkv_cluster.train.metrics import environment
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.metrics.loggers import finishing
from rwkv_cluster.train.metrics.step_timer import StepTimer
from rwkv_cluster.train.module import TrainingModule
from rwkv_cluster.train.optimizers.table import optimizer_of
from rwkv_cluster.train.parallel.strategy import leaving, sums_in_fp32
from rwkv_cluster.train.parallel.teardown import free_memory
from rwkv_cluster.train.placement import DTYPES
from rwkv_cluster.train.rollback import roll_back
from rwkv_cluster.train.sample import sample_text
from rwkv_cluster.train.schedule import decay_is_cut
from rwkv_cluster.train.session import Session, base_fingerprint, build_model
from rwkv_cluster.train.trainer import (
    build_after_step,
    build_datamodule,
    build_profile,
    build_recorder,
    build_trainer,
    quiet_lightning,
)
from rwkv_cluster.workdir import atomic_write

log = logging.getLogger("rwkv_cluster")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. loss: of this session's last step; val_loss: of the last evaluation. None if there was none.

    ended_early: before total_steps, because the validation loss did not improve any more.
    """

    step: int
    total_steps: int
    tokens_seen: int
    loss: float | None
    val_loss: float | None
    work_dir: Path
    final_path: Path
    already_complete: bool
    ended_early: bool
    sample: str | None


@dataclass(frozen=True)
class _SessionEnd:
    """How a session ended. spike: set when the run must roll back; early: stopped by early stopping."""

    step: int
    loss: float | None
    val_loss: float | None
    spike: Spike | None
    early: bool


def fit(
    session: Session,
    tokenizer: Any,
    stop_request: StopRequest,
    callbacks: Sequence[Callback],
    report_activity: Callable[[str], None],
) -> TrainResult:
    """Train `session` to its end and say how it ended.

    report_activity: called with a short text ("evaluating") before anything between steps that may take long.

    Raises Preempted, TrainingError or CheckpointError.
    """
    if session.config.training.num_threads is not None:
        torch.set_num_threads(_threads(session.config.training.num_threads))
    if session.placement.accelerator == "cpu":
        keep_freed_memory()
    events = Events(session.work.events if rank() == 0 else None)
    alone = session.placement.world_size == 1 and not launched()
    with unchanged_environment() if alone else nullcontext(), leaving(session.config.training), sums_in_fp32():
        run = partial(_run_session, tokenizer, stop_request, callbacks, events, report_activity)
        ended = run(session, is_first_session=True)
        while ended.spike is not None:
            session = roll_back(session, ended.spike, events)
            ended = run(session, is_first_session=False)
    stop_request.end_steps()
    events.add("end", ended.step, loss=ended.loss, val_loss=ended.val_loss)
    return TrainResult(
        step=ended.step,
        total_steps=session.horizon.total_steps,
        tokens_seen=ended.step * session.sample_plan.tokens_per_step,
        loss=ended.loss,
        val_loss=ended.val_loss,
        work_dir=session.work.root,
        final_path=session.work.final_weights,
        already_complete=False,
        ended_early=ended.early,
        sample=_sample(session, tokenizer, stop_request) if rank() == 0 else None,
    )


def _run_session(
    tokenizer: Any,
    stop_request: StopRequest,
    callbacks: Sequence[Callback],
    events: Events,
    report_activity: Callable[[str], None],
    session: Session,
    *,
    is_first_session: bool,
) -> _SessionEnd:
    """One pass of Lightning's loop, to the run's end or to a spike. is_first_session: of this process.

    Raises Preempted, TrainingError or CheckpointError.
    """
    config = session.config
    if rank() == 0:
        _require_disk_space(session)
    model = build_model(session)
    if rank() == 0 and session.base is None:
        session = replace(session, base=base_fingerprint(config, session.work))
    _write_config(session)
    if rank() == 0:
        environment.record(session.work.environment, session.placement, session.start_step)
    _announce(session, count(session.parameters.in_memory))
    fault_point("train.start")
    profile = build_profile(session) if is_first_session else None
    on_cuda, is_profiled = session.placement.accelerator == "cuda", profile is not None
    timer = StepTimer(on_cuda=on_cuda, annotate=is_profiled, report_activity=report_activity)
    recorder = build_recorder(session, timer, profile, is_first_session=is_first_session)
    after_step = build_after_step(session, tokenizer, recorder, stop_request, events)
    module = TrainingModule(
        model,
        config.training,
        session.sample_plan,
        session.horizon,
        resume_checkpoint=session.resume_checkpoint,
        observer=after_step,
        events=events,
    )
    if is_first_session:
        _tell_begin(session, events)
    with events.log_exit(lambda: module.step):
        with after_step, quiet_lightning(), naming_remedy(config.training):
            trainer = build_trainer(
                session, [StableBuckets(), AllReduceCheck(), timer, after_step, DetachProcessWatcher(), *callbacks]
            )
            with finishing(trainer.loggers):
                trainer.fit(module, datamodule=build_datamodule(session))
        return _session_end(session, module, after_step, stop_request)


def _session_end(
    session: Session, module: TrainingModule, after_step: AfterStep, stop_request: StopRequest
) -> _SessionEnd:
    """Raises Preempted where somebody has asked for the end."""
    early = after_step.evaluator.improvement.ends(session.config.training.early_stop_patience)
    complete = early or (module.step == session.horizon.total_steps and after_step.unfinished is None)
    if not complete and after_step.spike is None:
        raise Preempted(
            f"stopped by {stop_request.reason or 'another rank'} after step {module.step} of "
            f"{session.horizon.total_steps}; a checkpoint is in {session.work.checkpoints}",
            remedy="Run the same command again to continue",
        )
    last_val = after_step.evaluator.last
    return _SessionEnd(module.step, after_step.last_loss, last_val.loss if last_val else None, after_step.spike, early)


def _threads(count: int) -> int:
    """No more than there are processors: threads that wait for each other make steps slower by orders of magnitude."""
    processors = os.cpu_count() or count
    if count > processors:
        log.info(f"training.num_threads is {count}, but this machine has {processors} processors: using those")
    return min(count, processors)


def _require_disk_space(session: Session) -> None:
    """Room for what is written next. Raises CheckpointError."""
    work, item_bytes = session.work, DTYPES[session.config.training.precision].itemsize
    is_new = session.resume_checkpoint is None and not work.initial_weights.exists()
    optimizer = optimizer_of(session.config.training)
    ranks = session.placement.world_size
    n_bytes = bytes_needed_next(session.parameters, item_bytes, ranks, optimizer, begins=is_new)
    require_disk_space(work.checkpoints, n_bytes, "the next checkpoint and the weights beside it")


def _sample(session: Session, tokenizer: Any, stop_request: StopRequest) -> str | None:
    """Sample from the weights on the disk: under ZeRO-3 no rank has the model, and here rank 0 is alone.

    None also for who wants the end: the run is complete without it.
    """
    if session.config.logging.sample_tokens == 0:
        return None
    try:
        if not stop_request.requested():
            return _last_sample(session, tokenizer)
    except Interrupted as error:
        log.info("%s: the last sample is left out", error)
    return None


def _last_sample(session: Session, tokenizer: Any) -> str | None:
    """Sample of a GPU in the run's precision, where that is what has trained and has memory for it, else of the CPU."""
    free_memory()
    if session.placement.accelerator == "cuda":
        try:
            model = _final_model(session, "cuda", DTYPES[session.config.training.precision])
            return sample_text(model, tokenizer, session.config.logging)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.info("the last sample is made on the CPU: the GPU has no memory for it")
    return sample_text(_final_model(session, "cpu", torch.float32), tokenizer, session.config.logging)


def _final_model(session: Session, device: str, dtype: torch.dtype) -> RWKV:
    """The model that the run has left."""
    load = partial(load_model, device=device, dtype=dtype)
    if session.config.adapter.kind != STATE:
        return load(session.work.final_weights)
    model = load(session.work.initial_weights)
    load_state(model, session.work.final_weights)
    return model


def _announce(session: Session, n_parameters: int) -> None:
    """What is going to happen, in one line."""
    if rank() != 0:
        return
    model, placement = session.config.model, session.placement
    ranks = (
        f"{placement.world_size} ranks on {placement.accelerator}"
        if placement.world_size > 1
        else placement.accelerator
    )
    begin = f"continuing at step {session.start_step}" if session.resume_checkpoint else "starting"
    log.info(
        f"{begin}: {model.model_type} of {n_parameters:,} parameters, {session.horizon.total_steps:,} steps of "
        f"{session.sample_plan.tokens_per_step:,} tokens, {session.config.training.precision} on {ranks}"
    )
    if decay_is_cut(session.config.training, session.sample_plan.tokens_per_step, session.horizon.tokens):
        log.warning("the learning rate's decay is longer than what follows warm-up: it begins where warm-up ends")
    is_one_batch = session.sample_plan.global_batch_size == session.config.training.micro_bsz
    if session.config.training.statistics_interval_steps is not None and is_one_batch:
        log.warning(
            "the gradient's noise shows between micro batches, and a step of this run is one: grad_signal and "
            "grad_noise are left out of the metrics"
        )


def _tell_begin(session: Session, events: Events) -> None:
    facts: dict[str, Any] = {"host": socket.gethostname(), "world_size": session.placement.world_size}
    facts |= {"total_steps": session.horizon.total_steps, "tokens_per_step": session.sample_plan.tokens_per_step}
    if session.resume_checkpoint is not None:
        events.add("resume", session.start_step, from_step=session.start_step, **facts)
    else:
        events.add("start", 0, **facts)


def _write_config(session: Session) -> None:
    """Leave the resolved configuration where `eval`, `generate` and people look for it."""
    if rank() == 0:
        work = session.work
        for path, dump in ((work.config_yaml, loader.dump_yaml), (work.config_json, loader.dump_json)):
            content = dump(session.config).encode()
            with writing(path, len(content)):
                atomic_write(path, content)
