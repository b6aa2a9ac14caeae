"""Build what a session trains with: Lightning's Trainer, the data, and the callback that follows each step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import Callback, Trainer

from rwkv_cluster.config import Config, GuardConfig, TrainingConfig
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.callbacks.after_step import AfterStep
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.train.checkpoint.disk_space import checkpoint_bytes_of
from rwkv_cluster.train.checkpoint.saver import Saver
from rwkv_cluster.train.datamodule import TokenDataModule
from rwkv_cluster.train.evaluate import Evaluator, sizes_of
from rwkv_cluster.train.guards.spike_guard import SpikeGuard
from rwkv_cluster.train.guards.stop_request import StopRequest, disable_lightning_signal_handlers
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.metrics.loggers import loggers
from rwkv_cluster.train.metrics.metrics_file import EMA_COLUMNS, STATISTICS_COLUMNS, MetricsWriter
from rwkv_cluster.train.metrics.profiler import StepProfile
from rwkv_cluster.train.metrics.progress import Progress
from rwkv_cluster.train.metrics.step_recorder import EpochMean, RunRecords, StepRecorder
from rwkv_cluster.train.metrics.step_timer import StepTimer
from rwkv_cluster.train.metrics.step_times import StepTimes, rewind_absent
from rwkv_cluster.train.metrics.throughput import utilization
from rwkv_cluster.train.metrics.train_log import TrainLog
from rwkv_cluster.train.optimizers.table import optimizer_of
from rwkv_cluster.train.parallel import strategy
from rwkv_cluster.train.placement import Placement
from rwkv_cluster.train.sample import Sampler
from rwkv_cluster.train.session import Session


def build_trainer(session: Session, callbacks: list[Callback]) -> Trainer:
    """The Trainer of a session. It has no max_steps: callbacks.AfterStep sets should_stop."""
    trainer = Trainer(
        **strategy.trainer_arguments(session.config.training, session.placement, session.group, session.work.hang),
        max_epochs=1,
        accumulate_grad_batches=session.accumulate,
        callbacks=callbacks,
        logger=loggers(session.config.logging, session.work, session.recorded_step),
        default_root_dir=session.work.root,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    disable_lightning_signal_handlers(trainer)
    return trainer


def build_datamodule(session: Session) -> TokenDataModule:
    """This rank's batches from where the session starts."""
    return TokenDataModule(
        session.train_windows(),
        session.sample_plan,
        start_step=session.start_step,
        # one batch more where the last step has left something undone, so that the loop comes to run at all
        total_steps=max(session.horizon.total_steps, session.start_step + 1),
        micro_bsz=session.config.training.micro_bsz,
    )


def build_after_step(
    session: Session, tokenizer: Any, recorder: StepRecorder, stop_request: StopRequest, events: Events
) -> AfterStep:
    """What follows each step of the session: its guard, evaluations, samples, records and checkpoints."""
    config, work = session.config, session.work
    checkpointer = Checkpointer(
        work.checkpoints,
        config.checkpoint.keep_last,
        background=_saves_in_background(config, session.placement),
        n_bytes=checkpoint_bytes_of(session.parameters, session.placement.world_size, optimizer_of(config.training)),
        reach_steps=_reach_steps(config.guard),
        events=events,
    )
    after_step = AfterStep(
        session.horizon,
        stop_request,
        SpikeGuard(config.guard, session.spikes),
        Evaluator(config, session.val_windows(), sizes_of(tokenizer), session.improvement, events),
        Sampler(tokenizer, config.logging, work.samples, events),
        recorder,
        Saver(config, work, session.identity, checkpointer, events),
    )
    after_step.unfinished = session.unfinished
    return after_step


def build_recorder(
    session: Session, timer: StepTimer, profile: StepProfile | None, *, is_first_session: bool
) -> StepRecorder:
    """The recorder of a session, which first drops what its files hold of steps that come again.

    is_first_session: of this process.
    """
    config, checkpoint = session.config, session.resume_checkpoint
    if rank() == 0:
        rewind_absent(session.work.step_times, session.placement.world_size, session.start_step)
    return StepRecorder(
        timer,
        StepTimes(session.work.step_times, rank(), session.start_step),
        EpochMean(checkpoint.state.epoch_loss_sum, checkpoint.state.epoch_loss_count) if checkpoint else EpochMean(),
        run_records=_run_records(session, is_first_session=is_first_session) if rank() == 0 else None,
        utilization=utilization(config, session.placement),
        profile=profile,
    )


def _run_records(session: Session, *, is_first_session: bool) -> RunRecords:
    config, work, horizon = session.config, session.work, session.horizon
    start_epoch = horizon.epoch_of(session.recorded_step)
    return RunRecords(
        MetricsWriter(
            work,
            start_step=session.recorded_step,
            is_first_session=is_first_session,
            optional=_optional_columns(config.training),
        ),
        TrainLog(work, start_epoch=start_epoch, header=config.model_dump_json()),
        Progress(config.logging, horizon.total_steps, session.start_step),
    )


def _optional_columns(training: TrainingConfig) -> tuple[str, ...]:
    ema = EMA_COLUMNS if training.ema_decay is not None else ()
    return ema + (STATISTICS_COLUMNS if training.statistics_interval_steps is not None else ())


def build_profile(session: Session) -> StepProfile | None:
    """The profile of the session's first steps, where one is wanted."""
    n_steps = session.config.logging.profile_steps
    on_cuda = session.placement.accelerator == "cuda"
    return StepProfile(session.work.profile, n_steps, on_cuda=on_cuda) if n_steps else None


def _reach_steps(guard: GuardConfig) -> int:
    """How old a checkpoint has to be for a rollback."""
    return guard.spike_lead_steps + guard.spike_patience_steps if guard.on_spike == "rollback" else 0


def _saves_in_background(config: Config, placement: Placement) -> bool:
    """Whether checkpoints are written in the background: on a GPU by default; a CPU's cores train."""
    configured = config.checkpoint.background
    return placement.accelerator == "cuda" if configured is None else configured


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's notes on devices, data workers and its own internals are not the user's business."""
    loggers_ = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers_]
    for logger in loggers_:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(pytorch_lightning|lightning_fabric)")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
            yield
    finally:
        for logger, level in zip(loggers_, levels, strict=True):
            logger.setLevel(level)
