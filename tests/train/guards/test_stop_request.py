"""Who handles SIGTERM after a session: the handler from before, but not where a launcher is about to send one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_cluster.errors import Preempted
from rwkv_cluster.runtime.interrupt import STOP_SIGNALS
from rwkv_cluster.train.guards.stop_request import StopRequest


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_handlers_from_before_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted), StopRequest(tmp_path / "STOP").listening():
        raise Preempted("stopped")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_preempted_rank_outlives_its_launchers_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Preempted), StopRequest(tmp_path / "STOP").listening():
        raise Preempted("stopped by another rank")
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process


def test_another_error_under_a_launcher_gives_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="bad"), StopRequest(tmp_path / "STOP").listening():
        raise ValueError("bad")
    assert signal.getsignal(signal.SIGTERM) == before
