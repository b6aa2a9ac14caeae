"""logs/environment.json: one entry for each change of what the sessions ran on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkv_cluster.train.metrics import environment
from rwkv_cluster.train.placement import Placement


def test_a_session_that_changes_nothing_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "environment.json"
    environment.record(path, Placement("cpu", 1, 1, 1), 0)
    environment.record(path, Placement("cpu", 1, 1, 1), 5)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    environment.record(path, Placement("cpu", 1, 1, 1), 6)
    (first,) = json.loads(path.read_text())["sessions"]
    assert (first["step"], first["torch"], first["ranks"]) == (0, torch.__version__, 1)
    assert first["device"]
    assert first["memory_gb"] > 0
    environment.record(path, Placement("cpu", 2, 2, 1), 7)
    sessions = json.loads(path.read_text())["sessions"]
    assert [(one["step"], one["ranks"], one["slurm_job"]) for one in sessions] == [(0, 1, None), (7, 2, "77")]


def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text('{"sessions": 5}')
    environment.record(path, Placement("cpu", 1, 1, 1), 3)
    assert [one["step"] for one in json.loads(path.read_text())["sessions"]] == [3]
