"""`rwkv-cluster status`: what a run is doing, from its work directory alone, however it was started. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.data.manifest import DataManifest
from rwkv_cluster.data.preparation.publish import in_words, progress
from rwkv_cluster.data.verify import check_every_byte
from rwkv_cluster.errors import ConfigError, DataError, LaunchError
from rwkv_cluster.launch import jobs
from rwkv_cluster.report import run_files
from rwkv_cluster.report.run_files import number
from rwkv_cluster.runtime import lock
from rwkv_cluster.runtime.lock import Holder
from rwkv_cluster.runtime.terminal.live_line import clock_time
from rwkv_cluster.train.checkpoint.files import newest_good
from rwkv_cluster.train.checkpoint.state import CheckpointState
from rwkv_cluster.workdir import WorkDir

RATE_STEPS = 100  # of which the speed is the median
ENDS = ("stop", "end")  # the last event of a session that ends in order; one that begins adds another
SMOOTHING = 0.95  # of the loss, as in the progress line


@dataclass(frozen=True)
class Training:
    """How far the steps have come. loss: smoothed; seconds_left: at `tokens_per_s`, pauses included if `with_pauses`.

    None where the run's files do not say.
    """

    step: int
    total_steps: int | None
    tokens: int
    loss: float
    last_loss: float
    val_loss: float | None
    val_loss_step: int | None
    tokens_per_s: float | None
    seconds_left: float | None
    with_pauses: bool


@dataclass(frozen=True)
class SavedState:
    """The newest checkpoint with which nothing is wrong. verified: every byte was read, and not only sizes compared."""

    path: Path
    step: int
    n_bytes: int
    verified: bool


@dataclass(frozen=True)
class RunStatus:
    """state: running, preparing data, complete, stopped, died (its process is gone, or silent), or not started.

    faults: of the data, and of checkpoints newer than `checkpoint`. event: the last line of logs/events.jsonl.
    preparation: how far one under way has come, see `preparation.publish`. data, launch: None without one; `launch`
    is a sentence where its state cannot be known here.
    """

    work_dir: Path
    state: str
    holder: Holder | None
    training: Training | None
    checkpoint: SavedState | None
    faults: list[str]
    event: dict[str, Any] | None
    data: DataManifest | None
    preparation: dict[str, Any] | None
    launch: jobs.Status | str | None


def read_status(work: WorkDir, *, verify: bool = False) -> RunStatus:
    """What is going on in a work directory. Raises ConfigError for another.

    verify: read every byte of the checkpoint and of the data. Takes seconds where the lock is held by another machine,
    whose heartbeat has to be watched.
    """
    if not run_files.is_work_dir(work):
        raise ConfigError(
            f"{work.root}: there is no run: it has no configs/config.yaml, prepared data, lock or launch",
            remedy="Name the work directory of a run",
        )
    work.require_kinds()
    holder = lock.holder(work.lock_file)
    config, data = run_files.read_config(work), run_files.read_manifest(work)
    found, faults = newest_good(work.checkpoints, checksums=verify)
    faults += _data_faults(work, data, verify)
    saved = SavedState(found.path, found.step, found.n_bytes, verify) if found else None
    known = (config if isinstance(config, Config) else None, data if isinstance(data, DataManifest) else None)
    training = _training(work, *known) or (_training_saved(found.state, *known) if found else None)
    preparation = progress(work.data) if holder is not None and holder.alive else None
    events = run_files.last_json_lines(work.events)
    event = events[-1] if events else None
    if holder is not None and not holder.alive and event is not None and event.get("kind") in ENDS:
        holder = None  # it has ended in order, by an exception, which leaves its name in the lock
    state = _state(work, holder, training, preparation)
    events = run_files.last_json_lines(work.events)
    event = events[-1] if events else None
    return RunStatus(work.root, state, holder, training, saved, faults, event, known[1], preparation, _launch(work))


def _data_faults(work: WorkDir, data: DataManifest | str, verify: bool) -> list[str]:
    if isinstance(data, str):
        return [data] if (work.data_manifest).exists() else []
    try:
        if verify:
            check_every_byte(data, work.data)
    except DataError as error:
        return [str(error)]
    return []


def _state(work: WorkDir, holder: Holder | None, training: Training | None, preparation: dict[str, Any] | None) -> str:
    if holder is not None:
        return "died" if not holder.alive else "running" if preparation is None else "preparing data"
    if training is None:
        return "not started"
    return "complete" if training.step == training.total_steps and work.final_weights.exists() else "stopped"


def _launch(work: WorkDir) -> jobs.Status | str | None:
    try:
        folder = jobs.newest(work)
    except LaunchError as error:
        return str(error) if isinstance(error.__cause__, PermissionError) else None
    try:
        return jobs.status(folder)
    except LaunchError as error:
        remedy = f"{error.remedy or 'Ask again'} to know the state of {folder}"
        return str(LaunchError(error.what, where=error.where, remedy=remedy))


def _training(work: WorkDir, config: Config | None, data: DataManifest | None) -> Training | None:
    path = work.metrics
    needed = ("step", "loss", "tokens")
    records = [
        record for record in run_files.last_json_lines(path) if all(number(record, name) is not None for name in needed)
    ]
    if not records:
        return None
    last = records[-1]
    end = run_files.end_of_run(config, data, last) if config and data else None
    evaluated = run_files.last_with(path, "val_loss") or {}
    rate, with_pauses = _rate(work, records)
    tokens_left = (end.total_steps - last["step"]) * last["tokens"] / last["step"] if end else None
    return Training(
        step=last["step"],
        total_steps=end.total_steps if end else None,
        tokens=last["tokens"],
        loss=_smoothed([record["loss"] for record in records]),
        last_loss=last["loss"],
        val_loss=number(evaluated, "val_loss"),
        val_loss_step=evaluated.get("step"),
        tokens_per_s=rate,
        seconds_left=tokens_left / rate if tokens_left is not None and rate else None,
        with_pauses=with_pauses,
    )


def _training_saved(state: CheckpointState, config: Config | None, data: DataManifest | None) -> Training | None:
    """What the newest checkpoint tells of it, where the logs are gone."""
    step, tokens, loss = state.step, state.tokens_seen, state.loss
    if loss is None:
        return None
    end = run_files.end_of_run(config, data, {"step": step, "tokens": tokens}) if config and data else None
    val_loss = state.val_loss
    return Training(
        step=step,
        total_steps=end.total_steps if end else None,
        tokens=int(tokens),
        loss=loss,
        last_loss=loss,
        val_loss=val_loss,
        val_loss_step=None if val_loss is None else int(step),
        tokens_per_s=None,
        seconds_left=None,
        with_pauses=False,
    )


def _smoothed(values: Sequence[float]) -> float:
    """Exponential mean without start-up bias: both sums start at zero."""
    total = weight = 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
    return total / weight


def _rate(work: WorkDir, records: list[dict[str, Any]]) -> tuple[float | None, bool]:
    """Tokens per second of the last steps, and whether pauses count: they do where rank 0 has recorded its time."""
    timed = run_files.last_json_lines(work.step_times / "rank-0.jsonl")
    seconds = [
        sum(value for name in record if name.endswith("_s") and (value := number(record, name))) for record in timed
    ]
    if sum(seconds) > 0:
        return records[-1]["tokens"] / records[-1]["step"] * len(seconds) / sum(seconds), True
    rates = sorted(rate for record in records[-RATE_STEPS:] if (rate := number(record, "tokens_per_s")))
    return (rates[len(rates) // 2] if rates else None), False


def rows(status: RunStatus) -> dict[str, str]:
    """The status as words, by name."""
    shown = {"held by": f"{status.holder}, {_liveness(status.holder)}" if status.holder else "no process"}
    if status.preparation is not None:
        shown["preparing"] = _preparation_text(status.preparation)
    elif status.data is not None:
        shown["data"] = f"{status.data.n_tokens:,} tokens in {status.data.n_documents:,} documents"
        shown |= {"samples": words} if (words := status.data.samples_in_words) else {}
    masked = status.data is not None and status.data.n_trained is not None
    shown |= _training_rows(status.training, masked) if status.training else {"step": "none yet"}
    shown["checkpoint"] = _checkpoint_text(status.checkpoint)
    shown |= {"damaged": "; ".join(status.faults)} if status.faults else {}
    shown |= {"last event": _event_text(status.event)} if status.event else {}
    if isinstance(status.launch, jobs.Status):
        shown["launch"] = f"{status.launch.state}  {status.launch.target}, {status.launch.detail}"
        shown["in"] = str(status.launch.folder)
    elif status.launch:
        shown["launch"] = status.launch
    return shown


def _liveness(holder: Holder) -> str:
    return "alive" if holder.alive else "exited or stopped responding. Run the same command again to continue"


def _preparation_text(progress: dict[str, Any]) -> str:
    rate = number(progress, "tokens_per_s")
    return in_words(progress) + (f", {rate:,.0f} tokens/s" if rate else "")


def _training_rows(training: Training, masked: bool) -> dict[str, str]:
    """Rows of how far the steps have come. masked: whether some tokens are not trained on."""
    total = training.total_steps
    share = f" of {total:,} ({training.step / total:.0%})" if total else ", the end is not known"
    shown = {"step": f"{training.step:,}{share}, {training.tokens:,} tokens"}
    shown["loss"] = f"{training.loss:.4f} smoothed, {training.last_loss:.4f} last" + (
        ", of trained tokens" if masked else ""
    )
    if training.val_loss is not None:
        shown["val loss"] = f"{training.val_loss:.4f} at step {training.val_loss_step:,}"
    if training.tokens_per_s:
        pauses = "saves and evaluations included" if training.with_pauses else "without saves and evaluations"
        shown["speed"] = f"{training.tokens_per_s:,.0f} tokens/s, {pauses}"
    if training.seconds_left and math.isfinite(training.seconds_left):
        shown["time left"] = f"{clock_time(training.seconds_left)} at that speed"
    return shown


def _event_text(event: dict[str, Any]) -> str:
    """`stop at step 190, 2026-11-26 14:03:11 UTC: stopped by SIGTERM ...`"""
    reason = f": {event['reason']}" if "reason" in event else ""
    return f"{event.get('kind')} at step {event.get('step')}, {run_files.moment(number(event, 'time') or 0)}{reason}"


def _checkpoint_text(saved: SavedState | None) -> str:
    if saved is None:
        return "none"
    how = "verified: every checksum fits" if saved.verified else "sizes are right; --verify reads every byte"
    return f"step {saved.step:,}, {saved.n_bytes / 1e6:,.1f} MB, {how}"


def format(status: RunStatus) -> str:
    """The status for a person: its state, then a table."""
    table = rows(status)
    width = max(map(len, table))
    lines = [f"{status.state}  {status.work_dir}", *(f"{name:<{width}}  {text}" for name, text in table.items())]
    return "\n".join(lines)
