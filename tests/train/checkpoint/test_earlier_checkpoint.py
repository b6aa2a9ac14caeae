"""Checkpoints that an earlier version wrote still resume, and lead to where the unbroken run leads.

tests/golden/checkpoint.tar.gz holds one, of step 4 of 8, whose validation a signal had cut short: it has an unfinished
step, losses that the spike guard has seen, and what early stopping counts. Its age is its use: write no new one.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.config import Config
from rwkv_cluster.train.run import train

EARLIER = Path(__file__).parents[2] / "golden" / "checkpoint.tar.gz"


def _config(folder: Path) -> Config:
    ranks = {f"{name}_lora_rank": 2 for name in ("decay", "a", "v", "gate")}
    return tiny_run_config(
        folder,
        model={"n_layer": 1, "n_embd": 8, "head_size_a": 8, "ctx_len": 16, **ranks},
        data={"write_jsonl": False},
        training={"micro_bsz": 2, "val_max_tokens": 256, "val_interval_steps": 2, "early_stop_patience": 9},
        guard={"on_spike": "stop", "spike_window_steps": 8},
    )


def _losses(config: Config) -> dict[int, dict[str, float]]:
    """Loss and, where there was an evaluation, validation loss, by step."""
    lines = (Path(config.work_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return {
        record["step"]: {name: record[name] for name in ("loss", "val_loss") if name in record}
        for record in map(json.loads, lines)
    }


def _state(config: Config, step: int) -> dict[str, Any]:
    path = Path(config.work_dir) / "out" / "checkpoints" / f"step-{step:08d}" / "state.json"
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def test_an_earlier_checkpoint_goes_on_as_the_unbroken_run(tmp_path: Path) -> None:
    """Between CPUs only the order of sums differs."""
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "resumed").mkdir()
    unbroken, resumed = _config(tmp_path / "unbroken"), _config(tmp_path / "resumed")
    train(unbroken)
    with tarfile.open(EARLIER) as archive:
        archive.extractall(Path(resumed.work_dir) / "out" / "checkpoints", filter="data")
    train(resumed)

    losses, expected = _losses(resumed), _losses(unbroken)
    assert list(losses) == [4, 5, 6, 7, 8]  # 4 was unfinished
    for step, values in losses.items():
        assert values == pytest.approx(expected[step], rel=1e-5), step
    state, other = _state(resumed, 8), _state(unbroken, 8)
    assert list(state) == list(other)
    for name in ("step", "tokens_seen", "epoch_loss_count", "optimizer_updates", "unfinished"):
        assert state[name] == other[name], name
    assert state["random_states"][0]["python"] == _state(resumed, 4)["random_states"][0]["python"]
    assert state["spikes"]["losses"] == pytest.approx(other["spikes"]["losses"], rel=1e-5)
    assert state["improvement"] == pytest.approx(other["improvement"], rel=1e-5)
