"""NCCL goes without /dev/shm where there is too little of it, and the user hears of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.runtime import nccl_shared_memory
from rwkv_cluster.train.parallel import nccl_environment
from rwkv_cluster.train.parallel.strategy import trainer_arguments
from rwkv_cluster.train.placement import Placement

SWITCH = "NCCL_SHM_DISABLE"
MORE_THAN_ANY = 2**60


@pytest.fixture(autouse=True)
def _no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "")  # remembered, and put back at the end
    del os.environ[SWITCH]


def test_room_enough_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_shared_memory, "WANTED_BYTES", 0)
    assert nccl_shared_memory.disable_nccl_shm_if_small() is None
    assert SWITCH not in os.environ


def test_too_little_room_turns_the_transport_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_shared_memory, "WANTED_BYTES", MORE_THAN_ANY)
    told = nccl_shared_memory.disable_nccl_shm_if_small()
    assert os.environ[SWITCH] == "1"
    assert told is not None
    free, total = nccl_shared_memory.usage()
    assert f"MiB free of {total >> 20:,}, and NCCL wants" in told
    assert "--shm-size" in told
    assert free <= total


@pytest.mark.parametrize("value", ["0", "1"])
def test_what_the_user_has_set_stays(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_shared_memory, "WANTED_BYTES", MORE_THAN_ANY)
    monkeypatch.setenv(SWITCH, value)
    assert nccl_shared_memory.disable_nccl_shm_if_small() is None
    assert os.environ[SWITCH] == value


def test_no_shared_memory_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_shared_memory, "PLACE", tmp_path / "missing")
    told = nccl_shared_memory.disable_nccl_shm_if_small()
    assert told is not None
    assert "cannot be used (No such file or directory)" in told
    assert os.environ[SWITCH] == "1"


@pytest.mark.parametrize(
    ("accelerator", "devices", "local_rank", "off", "says"),
    [
        ("cuda", 2, 0, True, True),
        ("cuda", 2, 1, True, False),
        ("cuda", 1, 0, False, False),
        ("cpu", 2, 0, False, False),
    ],
)
def test_several_gpus_of_a_machine_need_it(
    accelerator: str,
    devices: int,
    local_rank: int,
    off: bool,
    says: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(nccl_shared_memory, "WANTED_BYTES", MORE_THAN_ANY)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(nccl_environment, "missing_variables", lambda *_: {})
    with caplog.at_level(logging.WARNING, logger="rwkv_cluster"):
        trainer_arguments(
            TrainingConfig(strategy="ddp"), Placement(accelerator, devices, devices, 1), "group", tmp_path
        )
    assert (SWITCH in os.environ) == off
    assert ("NCCL goes without" in caplog.text) == says
