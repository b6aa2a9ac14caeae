"""Ranks that examine their job together: one table, who is missing or different, clocks and the shared directory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rwkv_cluster.doctor.distributed import checks, shared_folder
from rwkv_cluster.doctor.distributed.merge import Report, merged, who
from rwkv_cluster.doctor.distributed.rank_store import Meeting, meet
from rwkv_cluster.doctor.results import Row, ok, warning
from rwkv_cluster.errors import LaunchError


def in_threads(world_size: int, act: Callable[[Meeting], Any], *, absent: int = 0, patience_s: float = 10) -> list[Any]:
    """What each rank's `act` returns; the last `absent` ranks never come."""
    store = dist.HashStore()
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        found[rank] = act(Meeting(store, rank, world_size, patience_s))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size - absent)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(world_size - absent)]


def reports(*rows: Row) -> dict[int, Report]:
    """A rank with a row on each of as many nodes."""
    return {rank: Report(f"node{rank}", [row]) for rank, row in enumerate(rows)}


def test_ranks_tell_rank_0_and_hear_from_it() -> None:
    def act(meeting: Meeting) -> Any:
        return meeting.gather("number", meeting.rank * 10, range(3)), meeting.tell("word", f"from {meeting.rank}")

    heard = in_threads(3, act)
    assert heard == [({0: 0, 1: 10, 2: 20}, "from 0"), ({}, "from 0"), ({}, "from 0")]


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_said() -> None:
    first, second = in_threads(3, lambda meeting: meeting.gather("x", 1, range(3)), absent=1, patience_s=0.3)
    assert (first, second) == ({0: 1, 1: 1}, {})
    with pytest.raises(LaunchError, match=r"rank 0 .*not answered for 1 s"):
        Meeting(dist.HashStore(), 1, 2, 0.3).tell("x")


def test_ranks_that_have_nowhere_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(LaunchError, match=r"MASTER_ADDR and MASTER_PORT: .*one launcher"):
        meet(2, 1, 1.0)


def test_what_is_the_same_stands_once_and_what_differs_says_where() -> None:
    same, other = ok("torch", "2.13"), ok("torch", "2.12")
    assert merged(reports(same, same)) == [same]
    found = merged(reports(same, other, same))
    assert found == [replace(same, where="ranks 0, 2 on node0, node2"), replace(other, where="rank 1 on node1")]
    assert found[1].sentence == "rank 1 on node1: 2.12"


def test_of_measurements_the_least_stands_and_a_bad_one_stands_alone() -> None:
    fast, slow = ok("disk", "900 MB/s", figure=900), ok("disk", "300 MB/s", figure=300)
    (row,) = merged(reports(fast, slow, fast))
    assert row == ok("disk", "300 MB/s (the least of 3: rank 1 on node1)", figure=300)
    bad = warning("disk", "3 MB/s", "do", figure=3)
    assert [(row.state, row.where) for row in merged(reports(fast, bad))] == [
        ("ok", "rank 0 on node0"),
        ("warning", "rank 1 on node1"),
    ]


def test_ranks_are_named_by_range_and_host() -> None:
    there = {rank: Report(f"node{rank // 2}", []) for rank in range(6)}
    assert who([0, 1, 2, 5], there) == "ranks 0-2, 5 on node0, node1, node2"
    assert who([3], there) == "rank 3 on node1"


def test_clocks_apart() -> None:
    there = reports(*[ok("x", "")] * 3)
    assert checks._clocks({0: 1000.0, 1: 1004.0, 2: 999.0}, there).text == "at most 4.0 s apart"
    row = checks._clocks({0: 1000.0, 1: 1004.0, 2: 700.0}, there)
    assert row.state == "warning"
    assert row.text.startswith("that of rank 2 on node2 is 300 s behind rank 0's")


def test_ranks_that_run_something_else() -> None:
    mine = {"code": "a" * 64, "packages": {"python": "3.11", "torch": "2.13"}}
    arrived = {
        0: {"installation": mine},
        1: {"installation": {**mine, "packages": {"python": "3.11", "torch": "2.12"}}},
    }
    row = checks._alike(arrived, reports(ok("x", ""), ok("x", "")))
    assert (row.state, row.exit_code) == ("problem", 6)
    assert row.text == "rank 1 on node1 has other packages than rank 0 on node0: torch 2.12, there 2.13"


def test_absent_ranks_are_a_problem() -> None:
    row = checks._attendance(reports(ok("x", "")), 4)
    assert (row.state, row.exit_code) == ("problem", 6)
    assert re.fullmatch("3 of 4 ranks .* 120 s: 1-3", row.text)


def test_ranks_see_what_rank_0_renames_and_its_lock(tmp_path: Path) -> None:
    there = reports(ok("x", ""), ok("x", ""))
    rows, others = in_threads(2, lambda meeting: shared_folder.shared_directory(meeting, tmp_path, [0, 1], there))
    assert [(row.name, row.state) for row in rows] == [("shared directory", "ok"), ("shared locks", "ok")]
    assert others == []
    assert not list(tmp_path.iterdir())


def test_a_rank_that_sees_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "SEEN_S", 0.2)
    look = shared_folder._look
    monkeypatch.setattr(shared_folder, "_look", lambda made: look(tmp_path / "elsewhere" / made.name))
    there = reports(ok("x", ""), ok("x", ""))
    (row,), _ = in_threads(2, lambda meeting: shared_folder.shared_directory(meeting, tmp_path, [0, 1], there))
    assert (row.state, row.exit_code) == ("problem", 6)
    assert re.fullmatch(rf"rank 1 on node1 does not see .*{re.escape(str(tmp_path))} .*rank 0 .*", row.text)


def test_locks_that_do_not_reach_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder.fcntl, "flock", lambda descriptor, kind: None)
    there = reports(ok("x", ""), ok("x", ""))
    rows, _ = in_threads(2, lambda meeting: shared_folder.shared_directory(meeting, tmp_path, [0, 1], there))
    assert [row.state for row in rows] == ["ok", "note"]
    assert re.match("rank 0's lock .*rank 1 on node1: the heartbeat", rows[1].text)
