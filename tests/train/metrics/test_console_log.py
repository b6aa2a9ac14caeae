"""logs/train.log has what was said, and the error that ended the run, also where nobody listens to the log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster.errors import TrainingError
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.metrics.console_log import log_file
from rwkv_cluster.train.run import train

log = logging.getLogger("rwkv_cluster")


def test_a_run_appends_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run_config(tmp_path, logging={"log_interval_steps": 2, "sample_tokens": 0})
    monkeypatch.setenv(FAULT_VARIABLE, "train.loss@5:hit")
    level, handlers = log.level, list(log.handlers)
    with pytest.raises(TrainingError) as caught:
        train(config)
    monkeypatch.delenv(FAULT_VARIABLE)
    train(config)
    assert (log.level, log.handlers) == (level, handlers)
    lines = [line[24:] for line in (tmp_path / "work/logs/train.log").read_text().splitlines()]
    assert f"error: {caught.value}" in lines
    steps = [int(line.split("/")[0].split()[1]) for line in lines if line.startswith("step ")]
    assert steps == [2, 4, 6, 8]
    assert lines.index(f"error: {caught.value}") < next(
        index for index, line in enumerate(lines) if line.startswith("continuing at step 4")
    )


def test_a_full_disk_is_left_to_the_records(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_cluster.train.metrics.console_log.open_own", os.open)  # which would not open a device
    with log_file(Path("/dev/full")):
        log.info("no room for this")
    assert capsys.readouterr().err == ""
