"""Back to before a spike: which checkpoint, and the session that goes on from it without the spike's samples."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from rwkv_cluster.errors import CheckpointError, TrainingError
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.train.checkpoint import save_load
from rwkv_cluster.train.checkpoint.save_load import Checkpoint, checkpoint_path, list_steps
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.guards.spike_guard import Spike
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.parallel.teardown import free_memory
from rwkv_cluster.train.session import Session, guard_states

log = logging.getLogger("rwkv_cluster")


def roll_back(session: Session, spike: Spike, events: Events) -> Session:
    """The session that continues a checkpoint from before `spike`, or the beginning. Collective.

    Checkpoints of later steps are removed. Raises TrainingError on every rank where the configuration wants a stop, or
    has allowed no more rollbacks; then nothing is changed.
    """
    events.add("spike", spike.last_step + 1, **vars(spike))
    with events.log_exit(lambda: spike.last_step + 1):
        _require_allowed(session, spike)
        step, first_skipped = collectives.broadcast_object(_choose(session, spike) if rank() == 0 else (None, 0))
        if rank() == 0:
            _remove_checkpoints_after(session, step or 0)
        path = checkpoint_path(session.work.checkpoints, step) if step is not None else None
        checkpoint = save_load.verify(path) if path is not None else None
    spikes, improvement = guard_states(checkpoint)
    spikes = replace(spikes, rollbacks=session.spikes.rollbacks + 1)
    sample_plan = session.sample_plan.without(first_skipped, spike.last_step)
    resumed = replace(
        session, resume_checkpoint=checkpoint, sample_plan=sample_plan, spikes=spikes, improvement=improvement
    )
    n_left_out = spike.last_step + 1 - first_skipped
    facts = {"to_step": resumed.start_step, "skipped_steps": n_left_out, "skipped": sample_plan.skipped}
    events.add("rollback", spike.last_step + 1, **facts, rollbacks=spikes.rollbacks)
    if rank() == 0:
        log.warning(
            f"{spike}. Back to step {resumed.start_step}, to go on without the samples of {n_left_out} steps from step "
            f"{first_skipped} on; rollback {spikes.rollbacks} of at most {session.config.guard.max_rollbacks}"
        )
    free_memory()  # for the model and the optimizer that come in their place
    return resumed


def _require_allowed(session: Session, spike: Spike) -> None:
    guard = session.config.guard
    if guard.on_spike == "rollback" and session.spikes.rollbacks < guard.max_rollbacks:
        return
    before = [step for step in list_steps(session.work.checkpoints) if step <= spike.first_step]
    newest = f"the newest checkpoint from before it is of step {before[-1]}" if before else "no checkpoint is older"
    if guard.on_spike == "rollback":
        raise TrainingError(
            f"{spike}. There were {guard.max_rollbacks} rollbacks already (guard.max_rollbacks); {newest}",
            remedy="Lower training.lr_init, look at the data, or raise guard.max_rollbacks and run the same command "
            "again",
        )
    raise TrainingError(
        f"{spike}; {newest}",
        remedy="The same command goes on from the newest checkpoint and meets it again: set "
        "guard.on_spike to rollback to leave its samples out, or to ignore to go through it",
    )


def _choose(session: Session, spike: Spike) -> tuple[int | None, int]:
    """Step of the checkpoint to continue, None for the beginning, and the first step whose samples are left out.

    Where none is as old as that step, the oldest one from before the spike has to do, and what follows it is left out.
    """
    first_skipped = max(0, spike.first_step - session.config.guard.spike_lead_steps)
    steps = list_steps(session.work.checkpoints)
    checkpoint = _first_whole(session, (step for step in reversed(steps) if step <= first_skipped))
    if checkpoint is None and first_skipped > 0:
        checkpoint = _first_whole(session, (step for step in steps if first_skipped < step <= spike.first_step))
    return (None, first_skipped) if checkpoint is None else (checkpoint.step, max(checkpoint.step, first_skipped))


def _first_whole(session: Session, steps: Iterable[int]) -> Checkpoint | None:
    for step in steps:
        try:
            return save_load.verify(checkpoint_path(session.work.checkpoints, step))
        except CheckpointError as error:
            log.warning("damaged checkpoint passed over: %s", error)
    return None


def _remove_checkpoints_after(session: Session, step: int) -> None:
    """Newer checkpoints would be continued in place of the one that was chosen."""
    for later in list_steps(session.work.checkpoints):
        if later > step:
            save_load.remove(checkpoint_path(session.work.checkpoints, later))
