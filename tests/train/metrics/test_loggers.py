"""TensorBoard and Weights & Biases: present they get the run's numbers, absent they are asked for at once."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import losses, tiny_run_config

from rwkv_cluster.config import Config
from rwkv_cluster.errors import ConfigError, TrainingError
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.run import train


def _records(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.work_dir) / "logs/metrics.jsonl").read_text().splitlines()]


def _train_with_a_crash(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 and 6 are done twice: the checkpoint is of step 4."""
    monkeypatch.setenv(FAULT_VARIABLE, "train.loss@6:hit")
    with pytest.raises(TrainingError):
        train(config)
    monkeypatch.delenv(FAULT_VARIABLE)
    train(config)


def test_tensorboard_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run_config(tmp_path, logging={"tensorboard": True, "peak_tflops": 1.0, "sample_tokens": 0})
    _train_with_a_crash(config, monkeypatch)
    events = EventAccumulator(str(tmp_path / "work/logs/tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 9))
    assert [scalar.value for scalar in scalars] == pytest.approx(losses(config.work_dir), rel=1e-6)
    records = _records(config)
    assert set(events.Tags()["scalars"]) >= {name for record in records for name in record}
    for name in ("mfu", "hfu", "tokens_per_s"):
        values = [scalar.value for scalar in events.Scalars(name)]
        assert values == pytest.approx([record[name] for record in records], rel=1e-6)


@pytest.mark.system
def test_weights_and_biases_have_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an account or a network, as they are later sent by `wandb sync`: two sessions of one run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny_run_config(tmp_path, logging={"wandb_project": "mine", "peak_tflops": 1.0, "sample_tokens": 0})
    _train_with_a_crash(config, monkeypatch)
    files = sorted((tmp_path / "work/logs/wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # the same run's
    sent = []
    deadline = time.monotonic() + 60  # its own process writes the last rows after wandb.finish() has returned
    while len(sent) < 8 and time.monotonic() < deadline:
        sent = [row for path in files for row in _history(path)]
    records = _records(config)
    assert [row["trainer/global_step"] for row in sent] == list(range(1, 9))
    assert [row["loss"] for row in sent] == [record["loss"] for record in records]
    for row in sent:
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * records[0]["mfu"] / records[0]["tokens_per_s"])


def _history(path: Path) -> list[dict[str, Any]]:
    """Rows in a file of Weights & Biases: after 7 bytes a log as LevelDB's, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, position, whole, rows = path.read_bytes(), 7, b"", []
    while position + 7 < len(content):
        if (left := 32768 - position % 32768) < 7:  # a header of checksum, length and type does not fit
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if position + 7 + length > len(content):  # it is being written
            break
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_an_account_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"finds no API key.*`wandb login`.*WANDB_MODE=offline"):
        train(tiny_run_config(tmp_path, logging={"wandb_project": "mine"}))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("package", "setting"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb_project": "mine"})]
)
def test_a_missing_package_is_said_before_anything_is_written(
    package: str, setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without the extra: the package cannot be found."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=rf"{package} is not installed.*pip install 'rwkv-cluster\[{package}\]'"):
        train(tiny_run_config(tmp_path, logging=setting))
    assert not (tmp_path / "work").exists()
