"""Loss spikes: what is one, and a run that goes back before it ends where one ends that never met its samples."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import fingerprint, losses, tiny_run_config

from rwkv_cluster.config import Config, GuardConfig
from rwkv_cluster.data.sampler import CubicOrder, SamplePlan
from rwkv_cluster.errors import Preempted, TrainingError
from rwkv_cluster.report.run_files import events as read_events
from rwkv_cluster.train import run
from rwkv_cluster.train.checkpoint.checkpointer import prune
from rwkv_cluster.train.checkpoint.save_load import list_steps, newest_verified
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.guards.spike_guard import Spike, SpikeGuard, SpikeState
from rwkv_cluster.workdir import WorkDir

CALM = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.1, 1.9]  # median 2.0, MAD 0.075
LIMIT = 2.0 + 6 * 1.4826 * 0.075
SPIKES_AT_14 = "train.spike@14-15:hit"  # patience of two: steps 14 and 15, of batches 14 and 15


def _guard(state: SpikeState | None = None, **changes: Any) -> SpikeGuard:
    config = GuardConfig(**{"on_spike": "stop", "spike_window_steps": 8, "spike_patience_steps": 2, **changes})
    return SpikeGuard(config, state or SpikeState.at_start())


def _spikes(guard: SpikeGuard, values: list[float], first_step: int = 0) -> list[Spike]:
    seen = (guard.update(step, value) for step, value in enumerate(values, start=first_step))
    return [spike for spike in seen if spike is not None]


def test_a_spike_lasts_for_the_patience_and_lies_above_the_limit() -> None:
    (spike,) = _spikes(_guard(), [*CALM, 2.7, 2.8, 2.0])
    assert (spike.first_step, spike.last_step, spike.loss, spike.median) == (8, 9, 2.8, 2.0)
    assert spike.limit == pytest.approx(LIMIT)
    assert not _spikes(_guard(), [*CALM, LIMIT - 0.01, LIMIT - 0.01])
    assert not _spikes(_guard(), [*CALM, 9.0, 2.0, 9.0, 2.0, 9.0])  # single ones
    assert not _spikes(_guard(), [*CALM, -9.0, -9.0, -9.0])
    assert not _spikes(_guard(), [*CALM[:-1], 9.0, 9.0])  # the window is not full before the first 9
    assert not _spikes(_guard(on_spike="ignore"), [*CALM, 9.0, 9.0, 9.0])


def test_losses_that_are_all_alike_leave_room_for_rounding() -> None:
    assert not _spikes(_guard(), [2.0] * 8 + [2.01] * 3)
    assert _spikes(_guard(), [2.0] * 8 + [2.02] * 2)


def test_a_restart_at_any_step_forgets_nothing() -> None:
    values = [*CALM, 9.0, 2.0, 2.1, 9.0, 9.0]
    for cut in range(len(values)):
        first = _guard()
        _spikes(first, values[:cut])
        assert _spikes(_guard(first.state), values[cut:], cut) == _spikes(_guard(), values)


def test_batches_left_out_shift_those_that_follow() -> None:
    plan = SamplePlan(8, CubicOrder(101), 2)
    assert [plan.batch(step) for step in range(4)] == [0, 1, 2, 3]
    plan = plan.without(1, 2)
    assert [plan.batch(step) for step in range(4)] == [0, 3, 4, 5]
    plan = plan.without(2, 2)  # of batch 4
    assert plan.skipped == ((1, 3), (4, 5))
    assert [plan.batch(step) for step in range(4)] == [0, 3, 5, 6]
    plan = plan.without(0, 2)  # batches 0 to 5, around what is left out already
    assert plan.skipped == ((0, 6),)
    assert list(plan.samples(0)) == [13, 14]


def test_pruning_keeps_what_a_rollback_needs(tmp_path: Path) -> None:
    """At any time one of the checkpoints is `reach` steps older than the newest, and they do not pile up."""
    for step in range(10, 1000, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
        prune(tmp_path, keep_last=2, reach_steps=105)
        steps = list_steps(tmp_path)
        assert len(steps) <= 5
        assert step < 230 or steps[0] <= step - 105
        assert steps[0] == 10 or steps[0] > step - 3 * 105
    prune(tmp_path, keep_last=2)
    assert list_steps(tmp_path) == [980, 990]


def _config(folder: Path, on_spike: str = "rollback", *, save_interval_steps: int = 4, **guard: Any) -> Config:
    folder.mkdir(exist_ok=True)
    guard = {"on_spike": on_spike, "spike_window_steps": 8, "spike_patience_steps": 2, "spike_lead_steps": 3} | guard
    training = {"max_steps": 20, "lr_init": 1e-4, "val_interval_steps": 5}
    return tiny_run_config(
        folder, training=training, guard=guard, checkpoint={"save_interval_steps": save_interval_steps, "keep_last": 2}
    )


def _skipping_from_the_start(config: Config, skipped: tuple[tuple[int, int], ...], patch: pytest.MonkeyPatch) -> None:
    """Train `config` as a run whose plan never had these batches."""
    found = run.open_session

    def open_session(*arguments: Any) -> Any:
        session = found(*arguments)
        return replace(session, sample_plan=replace(session.sample_plan, skipped=skipped))

    with patch.context() as patched:
        patched.setattr(run, "open_session", open_session)
        run.train(config)


@pytest.mark.system
def test_a_rollback_ends_where_a_run_ends_that_never_had_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, other = _config(tmp_path / "spiked"), _config(tmp_path / "skipping")
    monkeypatch.setenv(FAULT_VARIABLE, SPIKES_AT_14)
    result = run.train(config)
    assert result.step == 20
    assert "steps 14 to 15: the loss spikes" in caplog.text
    assert re.search("Back to step 8, .* 5 steps from step 11 on; rollback 1 of at most 3", caplog.text)
    monkeypatch.delenv(FAULT_VARIABLE)
    _skipping_from_the_start(other, ((11, 16),), monkeypatch)
    assert fingerprint(config.work_dir) == fingerprint(other.work_dir)
    events = [event for event in read_events(WorkDir(config.work_dir).events) if event["kind"] != "validation"]
    kinds = [(event["kind"], event["step"]) for event in events]
    saves = [("save", 4), ("save", 8), ("save", 12)]
    assert kinds[:6] == [("start", 0), *saves, ("spike", 16), ("rollback", 16)]
    assert kinds[6:9] == [("save", 12), ("save", 16), ("export", 20)]
    rollback = events[5]
    assert (rollback["to_step"], rollback["skipped_steps"], rollback["skipped"]) == (8, 5, [[11, 16]])
    state = newest_verified(WorkDir(config.work_dir).checkpoints).state
    assert (state.step, state.skipped, state.spikes.rollbacks) == (20, ((11, 16),), 1)


@pytest.mark.system
@pytest.mark.parametrize("stop_at", [9, 14, 17, *(pytest.param(step, marks=pytest.mark.slow) for step in (6, 12, 15))])
def test_stopped_anywhere_and_continued_a_rollback_is_the_same(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the spike, in it, and both times that the run comes by after it."""
    unbroken, stopped = (_config(tmp_path / name) for name in ("unbroken", "stopped"))
    monkeypatch.setenv(FAULT_VARIABLE, SPIKES_AT_14)
    run.train(unbroken)
    requested = run.StopRequest.requested
    calls: list[int] = []

    def stop_from_then_on(request: run.StopRequest) -> bool:
        calls.append(0)
        return len(calls) > stop_at or requested(request)

    with monkeypatch.context() as patched:
        patched.setattr(run.StopRequest, "requested", stop_from_then_on)
        with pytest.raises(Preempted):
            run.train(stopped)
    run.train(stopped)
    assert fingerprint(stopped.work_dir) == fingerprint(unbroken.work_dir)


@pytest.mark.system
def test_a_spike_before_any_checkpoint_goes_back_to_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path / "spiked", save_interval_steps=19)
    monkeypatch.setenv(FAULT_VARIABLE, SPIKES_AT_14)
    run.train(config)
    other = _config(tmp_path / "skipping")
    monkeypatch.delenv(FAULT_VARIABLE)
    _skipping_from_the_start(other, ((11, 16),), monkeypatch)
    assert losses(config.work_dir) == losses(other.work_dir)


@pytest.mark.system
def test_where_no_checkpoint_is_old_enough_the_samples_since_the_oldest_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where rollbacks are first wanted in the middle of a run, after its early checkpoints have been deleted."""
    config = _config(tmp_path, spike_lead_steps=13)
    monkeypatch.setattr("rwkv_cluster.train.trainer._reach_steps", lambda guard: 0)
    monkeypatch.setenv(FAULT_VARIABLE, SPIKES_AT_14)
    run.train(config)
    (rollback,) = (event for event in read_events(WorkDir(config.work_dir).events) if event["kind"] == "rollback")
    assert (rollback["to_step"], rollback["skipped"]) == (8, [[8, 16]])


@pytest.mark.system
def test_rollbacks_are_counted_over_restarts_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, max_rollbacks=2)
    monkeypatch.setenv(FAULT_VARIABLE, "train.spike@14-60:hit")
    for _ in range(2):  # again, from the last good checkpoint, as deterministic as it was
        with pytest.raises(TrainingError, match=r"There were 2 rollbacks already .*before it is of step \d+\. Lower"):
            run.train(config)
    assert newest_verified(WorkDir(config.work_dir).checkpoints).step <= 14
    events = read_events(WorkDir(config.work_dir).events)
    assert events[-1]["kind"] == "stop"


@pytest.mark.system
def test_a_stop_names_the_checkpoint_from_before_the_spike_and_leaves_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, "stop", save_interval_steps=5)  # due at 15, in the spike
    monkeypatch.setenv(FAULT_VARIABLE, SPIKES_AT_14)
    with pytest.raises(TrainingError, match=r"steps 14 to 15: the loss spikes, .*before it is of step 10") as caught:
        run.train(config)
    assert caught.value.exit_code == 1
    assert list_steps(WorkDir(config.work_dir).checkpoints) == [5, 10]
    assert len(losses(config.work_dir)) == 16
    assert run.train(_config(tmp_path)).step == 20  # as the sentence says


@pytest.mark.system
def test_ignored_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GuardConfig().on_spike == "ignore"
    monkeypatch.setenv(FAULT_VARIABLE, SPIKES_AT_14)
    assert run.train(_config(tmp_path, "ignore")).step == 20
