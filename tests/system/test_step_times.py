"""Two ranks under torchrun: each says where its own time goes, and goes on saying so after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from system.processes import Job, stopped_steps
from tiny_run import tiny_run_config, write_config

pytestmark = pytest.mark.system


def _steps(folder: Path, rank: int) -> dict[int, dict[str, float]]:
    lines = (folder / f"work/logs/events/rank-{rank}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {record["step"]: record for record in records}


def test_each_rank_tells_of_its_own_steps(tmp_path: Path, start: Callable[..., Job]) -> None:
    """Rank 1 waits for its data in step 6, and rank 0 for rank 1; both have a profile of the steps before."""
    config = tiny_run_config(tmp_path, training={"micro_bsz": 2}, logging={"sample_tokens": 0, "profile_steps": 2})
    write_config(tmp_path / "run.yaml", config)
    start(tmp_path, ranks=2, fault="data.batch@5#1:sleep=1.5").complete()
    ranks = [_steps(tmp_path, rank) for rank in (0, 1)]
    assert [len(steps) for steps in ranks] == [8, 8]
    late, waiting = (steps[6] for steps in reversed(ranks))
    assert late["data_s"] >= 1.5 > waiting["data_s"]
    # Nothing makes the ranks meet before the backward pass: meanwhile rank 0 may still write its profile.
    assert waiting["backward_s"] + waiting["optimizer_s"] >= 0.8
    for rank in (0, 1):
        profile = json.loads((tmp_path / f"work/logs/profile/rank-{rank}.json").read_text())
        assert (profile["rank"], profile["first_step"], profile["last_step"]) == (rank, 4, 5)
        assert sum(profile["parts_s"].values()) == pytest.approx(profile["whole_s"])
        assert profile["parts_s"]["communication"] > 0


def test_a_stopped_run_goes_on_with_fewer_ranks(tmp_path: Path, start: Callable[..., Job]) -> None:
    config = tiny_run_config(tmp_path, training={"global_batch_size": 4, "micro_bsz": 2})
    write_config(tmp_path / "run.yaml", config)
    stopped = start(tmp_path, ranks=2, fault="train.step@5#1:signal=SIGUSR1")
    assert stopped.wait() == 1
    assert stopped_steps(stopped.text) == {0: 6, 1: 6}
    assert [len(_steps(tmp_path, rank)) for rank in (0, 1)] == [6, 6]
    with open(tmp_path / "work/logs/events/rank-1.jsonl", "a") as file:
        file.write('{"step": 7}\n')  # as a crash after the checkpoint would have left it
    start(tmp_path).complete()
    assert [len(_steps(tmp_path, rank)) for rank in (0, 1)] == [8, 6]
