"""A rank that fails, dies, freezes or dawdles: the others end in bounded time and say which one it was, and where."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from system.processes import END_S, Job, Watched, by_hand, free_port, new_run, wait_for_end, wait_until
from tiny_run import losses, tiny_run_config, write_config

from rwkv_cluster.train.distributed.rank_monitor import SILENT_S

pytestmark = pytest.mark.system

TIMEOUT_S = 6.0
SLOW_TOKENIZER = """
import time
class Slow:
    vocab_size = 257
    def encode(self, text):
        time.sleep({seconds} / 67)  # documents
        return [byte + 1 for byte in text.encode()]
    def decode(self, ids):
        return bytes(i - 1 for i in ids if i).decode()
"""


def _new_run(folder: Path, *, preparation_s: float | None = None, **training: Any) -> Watched:
    folder.mkdir(exist_ok=True)
    data: dict[str, Any] = {}
    if preparation_s is not None:
        (folder / "slow.py").write_text(SLOW_TOKENIZER.format(seconds=preparation_s))
        data["tokenizer"] = {"type": "slow:Slow"}
    training = {"max_steps": 20, "micro_bsz": 2, "timeout_s": TIMEOUT_S} | training
    return new_run(folder, data=data, training=training, checkpoint={"save_interval_steps": 5000})


def test_bad_data_on_rank_0_without_an_agent(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C2: raised, no agent; then what has been left behind does not end the next start on the same port."""
    run = _new_run(tmp_path)
    good = (tmp_path / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(good + '{"text": 5}\n')
    port = free_port()
    jobs = [start(run.folder, environment=by_hand(rank, port)) for rank in (0, 1)]
    wait_until(lambda: not jobs[0].running(), what="rank 0's end")
    assert jobs[1].wait(10) == jobs[0].wait() == 3
    for rank in (0, 1):
        assert re.search(rf'rank {rank}: error: (rank 0: )?\S*text\.jsonl:68: "text" is a number', jobs[rank].text)

    (tmp_path / "text.jsonl").write_text(good)
    second = start(run.folder, environment=by_hand(1, port))
    wait_until(lambda: "rank 1 waits for the preparation" in second.text, what="rank 1")
    first = start(run.folder, environment=by_hand(0, port))
    first.complete()
    second.complete()
    assert not run.work.ranks.exists()


@pytest.mark.parametrize(
    ("number", "agent"),
    [pytest.param(signal.SIGKILL, True, marks=pytest.mark.slow), (signal.SIGKILL, False), (signal.SIGSTOP, False)],
    ids=["killed-torchrun", "killed-plain", "frozen-plain"],
)
def test_rank_0_is_lost_while_it_prepares(
    number: signal.Signals, agent: bool, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """C2: killed; and what is seen of a rank 0 that dies on another machine: no heartbeat."""
    run = _new_run(tmp_path, preparation_s=300)
    if agent:
        jobs = [start(run.folder, ranks=2)]
        victim = jobs[0].worker(0)
    else:
        port = free_port()
        jobs = [start(run.folder, environment=by_hand(rank, port)) for rank in (0, 1)]
        victim = jobs[0].process.pid

    def both_are_there() -> bool:
        text = "".join(job.text for job in jobs)
        return "rank 1 waits" in text and "preparing data in" in text

    wait_until(both_are_there, what="the preparation")
    time.sleep(3)  # rank 1 sees rank 0 alive
    os.kill(victim, number)
    killed = number == signal.SIGKILL
    codes = {1} if agent or killed else {6}
    assert jobs[-1].wait(10 if killed else SILENT_S + 10) in codes
    if not agent:
        how = "without reporting an error" if killed else "not updated its heartbeat"
        expected = rf"rank 1: error: rank 0 on {re.escape(socket.gethostname())}, process {victim}, .*{how}"
        assert re.search(expected, jobs[1].text), jobs[1].text


def test_a_rank_that_is_killed_before_the_ranks_have_met(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C1: nothing but the rank monitor knows of it then; the other waits in torch, where SIGTERM is only noted."""
    run = _new_run(tmp_path, timeout_s=600)
    port = free_port()
    jobs = [start(run.folder, environment=by_hand(rank, port), fault="train.start#1:sleep=600") for rank in (0, 1)]
    wait_until(lambda: "starting: " in jobs[0].text, what="rank 0")
    time.sleep(3)
    jobs[1].kill()
    assert jobs[0].wait(10) == 1
    assert re.search(rf"rank 0: error: rank 1 on \S+, process {jobs[1].process.pid}, exited without", jobs[0].text)


def test_preparation_may_take_longer_than_the_timeout(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C3."""
    run = _new_run(tmp_path, preparation_s=12, timeout_s=5)
    job = start(run.folder, ranks=2)
    job.complete()
    assert job.text.count("waits for") == 1
    assert len(losses(run.work.root)) == 20


def test_a_shared_directory_that_shows_files_late(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C13: rank 1 sees everything ten seconds after rank 0 has written it."""
    run = _new_run(tmp_path)
    late = tiny_run_config(
        tmp_path, training={"max_steps": 20, "micro_bsz": 2, "timeout_s": 60}, work_dir=str(tmp_path / "late")
    )
    write_config(tmp_path / "late.yaml", late)
    write_config(tmp_path / "run.yaml", late.model_copy(update={"work_dir": str(run.work.root)}))
    over = threading.Event()

    def copy() -> None:
        number = 0
        while not over.wait(1):
            with suppress(shutil.Error):  # a file that has gone while it was copied
                shutil.copytree(run.work.root, tmp_path / f"copy-{number}", ignore=shutil.ignore_patterns(".tmp-*"))
            if number >= 10:
                shutil.copytree(tmp_path / f"copy-{number - 10}", tmp_path / "late", dirs_exist_ok=True)
            number += 1

    run.work.create()
    copier = threading.Thread(target=copy)
    copier.start()
    port = free_port()
    try:
        jobs = [start(tmp_path, environment=by_hand(0, port))]
        jobs.append(start(tmp_path, environment=by_hand(1, port), config="late.yaml"))
        for job in jobs:
            job.complete()
    finally:
        over.set()
        copier.join()
    assert len(losses(run.work.root)) == 20


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [(2, 1), pytest.param(None, 0, marks=pytest.mark.slow)],
    ids=["torchrun-1", "devices-0"],
)
def test_a_frozen_rank(ranks: int | None, victim: int, tmp_path: Path, start: Callable[..., Job]) -> None:
    """C4: SIGSTOP."""
    # Stacks are written after three times the slowest step before. Lightning's launcher starts rank 1 late.
    timeout_s = 12.0 if ranks else 20.0
    run = _new_run(tmp_path, max_steps=5000, devices=1 if ranks else 2, timeout_s=timeout_s)
    job = start(run.folder, ranks=ranks)
    run.wait_for_steps(job, sessions=0, step=20)
    time.sleep(2)  # records are renewed once a second
    pids = [job.worker(0) if ranks else job.process.pid, job.worker(1)]
    os.kill(pids[victim], signal.SIGSTOP)
    assert job.wait(timeout_s + 15) != 0
    wait_for_end(pids, timeout_s=5)
    speaker = f"rank {1 - victim}: error: " if ranks else ""
    frozen = f"rank {victim} on {re.escape(socket.gethostname())}, process {pids[victim]}"
    found = re.search(rf"{speaker}{frozen}, last finished step (\d+), .*heartbeat for \d+ s", job.text)
    assert found, job.text
    assert 0 < int(found[1]) <= run.steps_logged() + 1
    if ranks:
        assert "in fit" in (run.work.hang / f"rank-{1 - victim}.txt").read_text()
        assert not (run.work.hang / f"rank-{victim}.txt").exists()


def test_an_endless_wait_for_data(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C4: a rank that lives and does not come."""
    run = _new_run(tmp_path, max_steps=5000)
    job = start(run.folder, ranks=2, fault="data.batch@40#1:sleep=600")
    run.wait_for_steps(job, sessions=0, step=20)
    pids = [job.worker(0), job.worker(1)]
    assert job.wait(TIMEOUT_S + 15 + 5) == 1  # five seconds for the steps from 20 to 40
    wait_for_end(pids, timeout_s=5)
    missing = (
        rf"rank 0: error: rank 1 on \S+, process {pids[1]}, last finished step 4\d, .*collective: it is loading data"
    )
    assert re.search(missing, job.text), job.text
    stacks = [(run.work.hang / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    for rank, doing, function in ((0, "computing", "backward"), (1, "loading data", "fault_point")):
        assert re.search(rf"rank {rank} on .*, last finished step 4\d, .*: it is {doing}", stacks[rank])
        assert f"in {function}" in stacks[rank]
    assert "stacks of its threads" in job.text


@pytest.mark.parametrize(
    ("each", "times"), [(1, 1), pytest.param(2, 10, marks=pytest.mark.slow)], ids=["two", "four, ten times"]
)
def test_jobs_at_once_on_one_machine(each: int, times: int, tmp_path: Path, start: Callable[..., Job]) -> None:
    """C7: as many with torchrun as with Lightning's launcher, each with a port of its own."""
    for repetition in range(times):
        jobs = []
        for number, ranks in enumerate(each * [2, None]):
            run = _new_run(tmp_path / f"{repetition}-{number}", timeout_s=60, devices=1 if ranks else 2)
            jobs.append(start(run.folder, ranks=ranks))
        for job in jobs:
            job.complete()


def _code(job: Job) -> int:
    """Exit code of the program: torchrun itself always ends with 1, and its report says what its ranks ended with."""
    assert job.wait(END_S) == 1, job.text
    return int(re.findall(r"exitcode +: (-?\d+) ", job.text)[-1])


@pytest.mark.slow
def test_exit_codes_under_torchrun(tmp_path: Path, start: Callable[..., Job]) -> None:
    """C10: configuration 2, data 3, checkpoint 4, lock 6, stopped 75."""
    run = _new_run(tmp_path, max_steps=5000, timeout_s=60)
    good = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(good.replace("micro_bsz: 2", "micro_bsz: 0"))
    codes = {"configuration": _code(start(tmp_path, ranks=2))}
    (tmp_path / "run.yaml").write_text(good.replace("text.jsonl", "nothing.jsonl"))
    codes["data"] = _code(start(tmp_path, ranks=2))
    (tmp_path / "run.yaml").write_text(good)
    holder = start(tmp_path, ranks=2)
    run.wait_for_steps(holder, sessions=0, step=1)
    codes["lock"] = _code(start(tmp_path, ranks=2))
    os.kill(holder.worker(0), signal.SIGTERM)
    codes["stopped"] = _code(holder)
    for weights in run.work.checkpoints.glob("*/weights.pth"):
        weights.write_bytes(weights.read_bytes()[:-100])
    codes["checkpoint"] = _code(start(tmp_path, ranks=2))
    assert codes == {"configuration": 2, "data": 3, "lock": 6, "stopped": 75, "checkpoint": 4}
