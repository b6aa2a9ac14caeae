"""What one rank concludes from the records of the others; `tests/system/test_missing_rank.py` has real ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_cluster.errors import TrainingError
from rwkv_cluster.runtime.heartbeat import Watch, write_record
from rwkv_cluster.train.distributed.rank_monitor import RankMonitor
from rwkv_cluster.train.distributed.rank_record import RankRecord, SessionStart
from rwkv_cluster.workdir import WorkDir


def test_a_rank_that_fails_while_it_is_looked_at_is_still_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks find the network cut at once; this one's next beat reads the other's end in the middle of its look."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    rank_monitor = RankMonitor(WorkDir(tmp_path), 2, timeout_s=10, hang_timeout_s=5)
    rank_monitor.folder.mkdir(parents=True)
    other = rank_monitor.others[0]

    def seen(**facts: Any) -> None:
        record = RankRecord(rank=0, host="node0", pid=7, step=94, state="running", doing="waiting for the other ranks")
        write_record(rank_monitor.path(0), replace(record, **facts).facts())
        other.poll()

    def accounted_for(watch: Watch) -> bool:
        assert watch is other
        seen(beats=3, state="failed", error="TrainingError", message="rank 1 cannot be reached")
        return True

    seen(beats=1)
    seen(beats=2)
    monkeypatch.setattr(RankMonitor, "_accounted_for", staticmethod(accounted_for))
    lost = RuntimeError("Connection closed by peer [10.77.0.1]:4321")
    named = r"rank 0 on node0, process 7, last finished step 94, cannot be reached"
    with pytest.raises(TrainingError, match=named), rank_monitor.running():
        raise lost


def test_a_record_is_read_as_it_was_written() -> None:
    record = RankRecord(rank=0, state="running", beats=2)
    assert RankRecord.of(record.facts()) == record
    assert "begins" not in record.facts()
    assert record.facts()["step"] is None
    begun = replace(record, begins=SessionStart("f5ba", 4, "group"), error="DataError", message="gone")
    assert RankRecord.of({**begun.facts(), "of a later version": 1}) == begun
    assert RankRecord.of({}) == RankRecord()
