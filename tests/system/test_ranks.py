"""Two ranks on gloo: the same bits twice, one step for all to stop at, one end for all when one fails."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from system.processes import Job, Watched, new_run, stopped_steps, wait_for_end, wait_until

pytestmark = pytest.mark.system

TOTAL_STEPS = 60


def _new_run(folder: Path, *, data: dict[str, Any] | None = None, **training: Any) -> Watched:
    return new_run(
        folder,
        data=data or {},
        training={"max_steps": TOTAL_STEPS, "micro_bsz": 2, **training},
        checkpoint={"save_interval_steps": 25},
    )


@pytest.mark.slow
def test_the_same_config_twice_is_equal(
    unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path)
    start(run.folder, ranks=2).complete()
    assert run.result() == unbroken(_new_run, 2, precision="fp32").result()


def test_devices_without_a_launcher_is_the_same_run(
    unbroken: Callable[..., Watched], tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, devices=2)
    start(run.folder).complete()
    assert run.result() == unbroken(_new_run, 2, precision="fp32").result()


@pytest.mark.parametrize(
    ("request_stop", "precision"), [("SIGTERM", "fp32"), pytest.param("STOP", "bf16", marks=pytest.mark.slow)]
)
def test_one_ranks_request_stops_all_at_one_step_and_continues_exactly(
    request_stop: str,
    precision: str,
    unbroken: Callable[..., Watched],
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    run = _new_run(tmp_path, precision=precision)
    job = start(run.folder, ranks=2)
    worker = job.worker(1)
    run.wait_for_steps(job, sessions=0, step=5)
    if request_stop == "STOP":
        (run.work.root / "STOP").touch()
    else:
        os.kill(worker, signal.SIGTERM)
    assert job.wait(10) == 1  # torchrun has one code for every failure; its log has the cause
    assert "exitcode  : 75" in job.text
    steps = stopped_steps(job.text)
    assert steps.keys() == {0, 1}
    assert set(steps.values()) == {run.newest_checkpoint()}
    assert run.newest_checkpoint() < TOTAL_STEPS
    start(run.folder, ranks=2).complete()
    assert run.result() == unbroken(_new_run, 2, precision=precision).result()


def test_only_rank_0_prepares_while_rank_1_waits(tmp_path: Path, start: Callable[..., Job]) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "class Slow:\n"
        "    vocab_size = 257\n"
        "    def encode(self, text):\n"
        "        open('encoded-by', 'a').write(os.environ['RANK'] + '\\n')\n"
        "        time.sleep(0.1)\n"
        "        return [byte + 1 for byte in text.encode()]\n"
        "    def decode(self, ids):\n"
        "        return bytes(i - 1 for i in ids if i).decode()\n"
    )
    run = _new_run(tmp_path, data={"tokenizer": {"type": "slow:Slow"}}, max_steps=2)
    job = start(run.folder, ranks=2)
    job.complete()
    assert set((tmp_path / "encoded-by").read_text().split()) == {"0"}
    assert job.text.count("data prepared in") == 1
    assert run.newest_checkpoint() == 2


def test_bad_data_on_rank_0_ends_rank_1(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path)
    with open(tmp_path / "text.jsonl", "a") as handle:
        handle.write('{"text": 5}\n')
    job = start(run.folder, ranks=2)
    workers = [job.worker(rank) for rank in (0, 1)]
    wait_until(lambda: "rank 0: error: " in job.text, what="rank 0's message")
    assert job.wait(10) == 1
    assert 'text.jsonl:68: "text" is a number' in job.text
    assert "exitcode  : 3" in job.text
    wait_for_end(workers, timeout_s=10)


@pytest.mark.parametrize(
    ("ranks", "what"),
    [(2, "loss"), pytest.param(None, "gradient", marks=pytest.mark.slow)],
    ids=["torchrun-loss", "devices-gradient"],
)
def test_nan_on_rank_1_stops_both_before_the_update(
    ranks: int | None, what: str, tmp_path: Path, start: Callable[..., Job]
) -> None:
    run = _new_run(tmp_path, devices=1 if ranks else 2)
    job = start(run.folder, ranks=ranks, fault=f"train.{what}@3#1:hit")
    assert job.wait() == 1, job.text
    assert f"rank 0: error: step 3: the {what} is not finite on rank 1 (" in job.text
    assert run.steps_logged() == 3
    assert run.newest_checkpoint() == 0


@pytest.mark.parametrize(
    ("ranks", "victims"),
    [
        (2, [0]),
        pytest.param(2, [1], marks=pytest.mark.slow),
        pytest.param(2, [0, 1], marks=pytest.mark.slow),
        pytest.param(None, [0], marks=pytest.mark.slow),
        (None, [1]),
    ],
    ids=["torchrun-0", "torchrun-1", "torchrun-both", "devices-0", "devices-1"],
)
def test_a_killed_rank_ends_the_other(
    ranks: int | None, victims: list[int], tmp_path: Path, start: Callable[..., Job]
) -> None:
    """C1."""
    run = _new_run(tmp_path, devices=1 if ranks else 2, max_steps=3000)
    job = start(run.folder, ranks=ranks)
    run.wait_for_steps(job, sessions=0, step=30)
    pids = [job.worker(0) if ranks else job.process.pid, job.worker(1)]
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    assert job.wait(10) != 0
    wait_for_end(pids, timeout_s=10)
    if ranks:
        tail = " ".join(line.strip() for line in job.text.splitlines()[-20:])
        assert any(re.search(rf"rank +: {victim} .*exitcode +: -9 ", tail) for victim in victims), job.text
    assert run.newest_checkpoint() >= 25


def test_the_workers_of_a_killed_torchrun_end(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C6."""
    run = _new_run(tmp_path, max_steps=3000)
    job = start(run.folder, ranks=2)
    run.wait_for_steps(job, sessions=0, step=5)
    workers = [job.worker(rank) for rank in (0, 1)]
    job.kill()
    wait_for_end(workers, timeout_s=15)


def test_three_ranks_continue_exactly(tmp_path: Path, start: Callable[..., Job]) -> None:
    """From three ranks on the order of a sum is visible in its last bits."""
    runs = [_new_run(tmp_path / name, max_steps=12) for name in ("unbroken", "stopped")]
    stopped = start(runs[1].folder, ranks=3, fault="train.step@5#2:signal=SIGUSR1")
    assert stopped.wait() == 1
    assert stopped_steps(stopped.text) == {0: 6, 1: 6, 2: 6}
    for run in runs:
        start(run.folder, ranks=3).complete()
    assert runs[0].result() == runs[1].result()
