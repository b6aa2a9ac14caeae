"""The lock between machines, where the kernel's flock may not reach: heartbeats decide."""

from __future__ import annotations

import errno
import itertools
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_cluster.errors import LaunchError, Preempted
from rwkv_cluster.runtime import heartbeat, lock
from rwkv_cluster.runtime.heartbeat import TEXT_LIMIT, Watch, every, read_record, write_record
from rwkv_cluster.runtime.lock import acquire

THEIRS = {"host": "node-7", "machine": "another kernel", "pid": 4711, "job": "77", "claim": "x", "since": "yesterday"}


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)


def test_a_holder_on_another_machine_is_named_while_it_lives(tmp_path: Path) -> None:
    path, beats = tmp_path / ".lock", itertools.count()
    with every(0.3, lambda: write_record(path, THEIRS | {"beats": next(beats)})):
        expected = r"^it .* process 4711 on node-7 in Slurm job 77 since yesterday\. .*`squeue -j 77`"
        with pytest.raises(LaunchError, match=expected), acquire(path, "it"):
            pass
        with pytest.raises(LaunchError, match=expected):
            lock.require_free(path, "it")


def test_a_lost_machine_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "TAKEOVER_S", 1.0)
    path = tmp_path / ".lock"
    write_record(path, THEIRS)
    with caplog.at_level(logging.WARNING), acquire(path, "it"):
        assert read_record(path)["machine"] == heartbeat.machine()
    (message,) = caplog.messages
    assert message.startswith("it is taken over: it was held by process 4711 on node-7 in Slurm job 77 since yesterday")
    assert read_record(path)["released"]
    with acquire(path, "it"):  # released: nobody has to be watched
        pass


@pytest.mark.parametrize(("error", "released"), [(Preempted("stopped"), True), (OSError("broken"), False)])
def test_an_end_in_order_lets_another_machine_go_on_at_once(error: Exception, released: bool, tmp_path: Path) -> None:
    """After any other, ranks of this run may still be writing elsewhere."""
    path = tmp_path / ".lock"
    with pytest.raises(type(error)), acquire(path, "it"):
        raise error
    assert ("released" in read_record(path)) is released


def test_without_flock_a_living_holder_of_this_machine_is_respected(tmp_path: Path, no_flock: None) -> None:
    path = tmp_path / ".lock"
    with acquire(path, "it"):
        with pytest.raises(LaunchError, match="it is in use by process "), acquire(path, "it"):
            pass
        assert read_record(path)["beats"] >= 2


def test_a_holder_that_was_displaced_ends_at_once(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from rwkv_cluster.runtime.lock import acquire\n"
    code += "with acquire(pathlib.Path(sys.argv[1]), 'it'): print('held', flush=True); time.sleep(60)"
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        write_record(path, THEIRS)
        _, text = holder.communicate(timeout=10)
    assert holder.returncode == LaunchError.exit_code
    assert "in use by process 4711 on node-7" in text
    assert read_record(path) == THEIRS


def test_a_watcher_that_was_away_has_not_watched(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_record(path, {"beats": 1})
    watch = Watch(path, interval_s=0.01)
    watch.poll()
    assert (watch.still_s, watch.alive) == (0.0, False)
    time.sleep(0.2)
    watch.poll()
    assert 0 < watch.still_s <= 0.02
    write_record(path, {"beats": 2})
    watch.poll()
    assert (watch.still_s, watch.alive, watch.record) == (0.0, True, {"beats": 2})


def test_records_hold_any_text_and_replace_longer_ones(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_record(path, {"message": "\U0001f600\udc80\n" * 1000})
    assert len(read_record(path)["message"]) == TEXT_LIMIT
    write_record(path, {"message": "short"})
    assert read_record(path) == {"message": "short"}
    path.write_text("[1]")
    assert read_record(path) == {}
    assert read_record(tmp_path / "missing") == {}
