"""Many processes, one work directory: one of them works in it, the others say at once who does."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from system.processes import Job, Watched, new_run
from tiny_run import write_text

from rwkv_cluster.data.preparation.prepare import load_manifest
from rwkv_cluster.errors import LaunchError, MissingDataError
from rwkv_cluster.runtime.heartbeat import BEAT_S, every, write_record
from rwkv_cluster.runtime.lock import TAKEOVER_S

pytestmark = pytest.mark.system

# Imports once and forks, so that 20 processes really are there at once.
AT_ONCE = """
import logging, os, sys
import rwkv_cluster.train.run
from rwkv_cluster.cli import main
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.tokenizer import build_tokenizer

def command():
    return main(["prepare", "run.yaml"])

def function():
    logging.basicConfig(level=logging.INFO)
    data = load_config("run.yaml").data
    print(prepare(data, build_tokenizer(data.tokenizer), "work/data").fingerprint)
    return 0

children = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        code = {what}()
        sys.stdout.flush()
        os._exit(code)
    children.append(child)
print("codes", *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def _new_run(folder: Path, **training: object) -> Watched:
    return new_run(folder, training=training, data={"n_epochs_duplication": 10})


def test_the_second_run_ends_at_once_and_names_the_first(tmp_path: Path, start: Callable[..., Job]) -> None:
    """D1."""
    run = _new_run(tmp_path, max_steps=100_000)
    first = start(run.folder, environment={"SLURM_JOB_ID": "77"})
    run.wait_for_steps(first, sessions=0, step=1)
    second = start(run.folder)
    assert second.wait(5) == 6
    assert re.search(
        rf"error: work_dir {re.escape(str(run.work.root))} .*process {first.process.pid} on "
        rf"{re.escape(socket.gethostname())} in Slurm job 77 since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\. "
        r".*`squeue -j 77`",
        second.text,
    )
    assert first.running()
    assert run.sessions() == 1


def test_of_two_started_together_one_runs(tmp_path: Path, start: Callable[..., Job]) -> None:
    run = _new_run(tmp_path, max_steps=50)
    jobs = [start(run.folder), start(run.folder)]
    assert sorted(job.wait() for job in jobs) == [0, 6]
    assert run.sessions() == 1
    assert run.newest_checkpoint() == 50


@pytest.mark.parametrize("what", ["command", pytest.param("function", marks=pytest.mark.slow)])
def test_twenty_preparations_at_once(what: str, tmp_path: Path) -> None:
    """D3. The command refuses while another holds the work directory; the function waits and uses what is there."""
    write_text(tmp_path / "text.jsonl", n_words=50_000)
    run = _new_run(tmp_path)
    with open(tmp_path / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", AT_ONCE.format(what=what)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        fingerprints = Counter()
        while process.poll() is None:
            try:
                fingerprints[load_manifest(run.work.data, verify=True).fingerprint] += 1
            except MissingDataError:
                continue
        output.seek(0)
        text = output.read()
    codes = [int(code) for code in re.search(r"^codes (.*)$", text, re.MULTILINE)[1].split()]
    final = load_manifest(run.work.data, verify=True).fingerprint
    assert set(fingerprints) <= {final}
    assert text.count("preparing data in") == 1
    if what == "function":
        assert codes == [0] * 20
        assert text.split().count(final) == 20
    else:
        assert set(codes) <= {0, 6}
        assert codes.count(0) >= 1
        assert text.count("is in use by process") == codes.count(6) >= 1


@pytest.mark.parametrize("gone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["there", "then gone"])
def test_a_holder_on_another_machine(gone: bool, tmp_path: Path, start: Callable[..., Job]) -> None:
    """D1, D2: refused while its heartbeat changes, a hundred times; taken over a minute after the last change."""
    run = _new_run(tmp_path, max_steps=2)
    run.work.create()
    record = {
        "host": "node-7",
        "machine": "another kernel",
        "pid": 4711,
        "claim": "theirs",
        "since": "2026-01-02 03:04:05",
    }
    beats = itertools.count()
    with every(BEAT_S, lambda: write_record(run.work.lock_file, record | {"beats": next(beats)})):
        refused = start(run.folder)
        began = time.monotonic()
        with ThreadPoolExecutor(100) as pool:
            outcomes = Counter(pool.map(lambda _: _try_to_hold(run), range(100)))
        assert time.monotonic() - began < 10
        assert set(outcomes) == {"refused"}
        assert refused.wait(10) == 6
        assert "is in use by process 4711 on node-7 since 2026-01-02 03:04:05" in refused.text
    if not gone:
        return
    gone_since = time.monotonic()
    job = start(run.folder)
    job.complete()
    assert time.monotonic() - gone_since > TAKEOVER_S
    assert "is taken over: it was held by process 4711 on node-7 since 2026-01-02 03:04:05" in job.text


def _try_to_hold(run: Watched) -> str:
    try:
        with run.work.lock():
            return "held"
    except LaunchError:
        return "refused"
