"""What a session needs beside its model and its loop: records, checkpoints, guards, samples, with its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rwkv_cluster.config import Config, GuardConfig
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.callbacks.after_step import AfterStep, EpochMean
from rwkv_cluster.train.checkpoint.checkpointer import Checkpointer
from rwkv_cluster.train.checkpoint.disk_space import Shapes, checkpoint_bytes
from rwkv_cluster.train.evaluate import sizes_of
from rwkv_cluster.train.guards.spike_guard import SpikeGuard
from rwkv_cluster.train.guards.stop_request import StopRequest
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.metrics.metrics_file import MetricsWriter, StepRecord
from rwkv_cluster.train.metrics.profiler import StepProfile
from rwkv_cluster.train.metrics.progress import Progress
from rwkv_cluster.train.metrics.step_timer import StepTimer
from rwkv_cluster.train.metrics.step_times import StepTimes, rewind_absent
from rwkv_cluster.train.metrics.throughput import utilization
from rwkv_cluster.train.parallel.strategy import Placement
from rwkv_cluster.train.sample import Sampler
from rwkv_cluster.train.session import Session


def build_callbacks(
    session: Session,
    tokenizer: Any,
    timer: StepTimer,
    profile: StepProfile | None,
    stop_request: StopRequest,
    shapes: Shapes,
    events: Events,
    do: Callable[[str], None],
    *,
    begins: bool,
) -> AfterStep:
    """begins: the session is the first of its process. do: told what this rank is going to do."""
    config, found = session.config, session.found
    start_epoch = session.horizon.epoch_of(session.recorded_step)
    is_rank_0 = rank() == 0
    records = (
        MetricsWriter(
            session.work,
            start_step=session.recorded_step,
            start_epoch=start_epoch,
            header=config.model_dump_json(),
        )
        if is_rank_0
        else None
    )
    if is_rank_0:
        rewind_absent(session.work.step_times, session.placement.world_size, session.start_step)
    return AfterStep(
        config,
        session.work,
        session.horizon,
        identity=session.identity,
        timer=timer,
        stop_request=stop_request,
        records=records,
        step_times=StepTimes(session.work.step_times, rank(), session.start_step),
        progress=Progress(config.logging, session.horizon.total_steps, session.start_step) if is_rank_0 else None,
        use=utilization(config, session.placement),
        profile=profile,
        logged_step=records.recorded_step if records and begins else session.recorded_step,
        val_tokens=session.val_tokens(),
        token_sizes=sizes_of(tokenizer),
        sampler=Sampler(tokenizer, config.logging, session.work.samples, events),
        epoch_mean=EpochMean(found.state["epoch_loss_sum"], found.state["epoch_loss_count"]) if found else EpochMean(),
        start_epoch=start_epoch,
        random_states=found.state["random_states"] if found else None,
        unfinished=StepRecord(**session.unfinished) if session.unfinished else None,
        checkpointer=Checkpointer(
            session.work.checkpoints,
            config.checkpoint.keep_last,
            background=_saves_in_background(config, session.placement),
            n_bytes=checkpoint_bytes(shapes, session.placement.world_size),
            reach_steps=_reach_steps(config.guard),
            events=events,
        ),
        events=events,
        guard=SpikeGuard(config.guard, session.spikes),
        improvement=session.improvement,
        do=do,
    )


def build_profile(session: Session) -> StepProfile | None:
    """The profile of the session's first steps, where one is wanted."""
    n_steps = session.config.logging.profile_steps
    on_cuda = session.placement.accelerator == "cuda"
    return StepProfile(session.work.profile, n_steps, on_cuda=on_cuda) if n_steps else None


def _reach_steps(guard: GuardConfig) -> int:
    """How old a checkpoint has to be for a rollback."""
    return guard.spike_lead_steps + guard.spike_patience_steps if guard.on_spike == "rollback" else 0


def _saves_in_background(config: Config, placement: Placement) -> bool:
    """On a GPU by default: on a CPU the writer would take the cores that train."""
    wanted = config.checkpoint.background
    return placement.accelerator == "cuda" if wanted is None else wanted
