"""`rwkv-cluster status` of directories that a run has left, holds, or has died in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import tiny_run_config

from rwkv_cluster import cli
from rwkv_cluster.data.preparation.publish import temporary_folder
from rwkv_cluster.data.preparation.tokenize import Progress
from rwkv_cluster.report import status
from rwkv_cluster.runtime import lock
from rwkv_cluster.runtime.heartbeat import this_process, write_record
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_run_config(folder))
    return folder / "work"


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> WorkDir:
    """A copy of a run of 8 steps with checkpoints of 4 and 8, to spoil."""
    return WorkDir(shutil.copytree(trained, tmp_path / "work"))


def say(work: WorkDir, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["status", str(work.root), *arguments]) == 0
    return capsys.readouterr().out


def test_a_complete_run_without_torch(work: WorkDir) -> None:
    code = f"from rwkv_cluster.cli import main; assert main(['status', {str(work.root)!r}, '--verify', '--json']) == 0"
    check = "import sys; assert not {'torch', 'pytorch_lightning', 'deepspeed'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    records = [json.loads(line) for line in (work.logs / "metrics.jsonl").read_text().splitlines()]
    training = found["training"]
    assert found["state"] == "complete"
    assert found["holder"] is None
    assert (training["step"], training["total_steps"], training["tokens"]) == (8, 8, records[-1]["tokens"])
    assert (training["last_loss"], training["val_loss"]) == (records[-1]["loss"], records[-1]["val_loss"])
    assert training["seconds_left"] == 0
    assert (found["checkpoint"]["step"], found["checkpoint"]["verified"]) == (8, True)
    assert (found["event"]["kind"], found["event"]["step"]) == ("end", 8)
    assert found["launch"] is None


def test_the_holder_is_named(work: WorkDir, capsys: pytest.CaptureFixture[str]) -> None:
    with lock.acquire(work.lock_file, "it"):
        text = say(work, capsys)
        found = json.loads(say(work, capsys, "--json"))
    assert text.startswith(f"running  {work.root}\n")
    assert found["holder"]["pid"] == this_process()["pid"]
    assert f"held by     process {this_process()['pid']} on {this_process()['host']} since 20" in text
    assert ", alive\n" in text
    assert say(work, capsys).startswith("complete")


def test_a_holder_that_was_killed(work: WorkDir, capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"pid": 4711, "started": "0", "job": "77", "since": "2026-01-01 00:00:00", "claim": "x"}
    write_record(work.lock_file, this_process() | gone)
    assert say(work, capsys).startswith("complete")  # its last word is that it has ended
    with open(work.events, "a") as handle:
        handle.write('{"time": 1, "step": 8, "kind": "resume", "from_step": 8}\n')
    text = say(work, capsys)
    assert text.startswith("died")
    assert "process 4711" in text
    assert "in Slurm job 77 since 2026-01-01 00:00:00, exited or stopped responding" in text


def test_a_holder_on_another_machine_is_watched(
    work: WorkDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "CHECK_S", 0.5)
    work.events.unlink()
    write_record(work.lock_file, {"host": "node-7", "machine": "another", "pid": 1, "since": "then", "claim": "x"})
    assert "held by     process 1 on node-7 since then, exited or stopped responding" in say(work, capsys)


def test_a_preparation_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = WorkDir(tmp_path / "work")
    work.create()
    with lock.acquire(work.lock_file, "it"), temporary_folder(work.data) as folder:
        progress = Progress("writing", folder, total=4_000_000)
        assert "writing, 0 of 4,000,000 tokens" in say(work, capsys)
        progress._last = time.monotonic() - 5
        progress._start = time.monotonic() - 10
        progress.advance(1_000_000)
        text = say(work, capsys)
        assert text.startswith("preparing data")
        assert "preparing   writing, 1,000,000 of 4,000,000 tokens, " in text
        assert "step        none yet" in text
    assert say(work, capsys).startswith("not started")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verified_is_said_only_of_bytes_that_were_read(work: WorkDir, capsys: pytest.CaptureFixture[str]) -> None:
    damage(work.checkpoints / "step-00000008" / "weights.pth")
    assert "step 8, " in (fast := say(work, capsys))
    assert "sizes are right; --verify" in fast
    text = say(work, capsys, "--verify")
    assert "checkpoint  step 4, " in text
    assert "verified: every checksum fits" in text
    assert "damaged     " in text
    assert "step-00000008/weights.pth: its sha256 is not the manifest's" in text
    with open(work.checkpoints / "step-00000008" / "optimizer.pth", "ab") as handle:
        handle.write(b"x")
    assert "checkpoint  step 4, " in say(work, capsys)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "val.bin", "val.idx", "vocab.txt", "train.jsonl"])
def test_damaged_data_is_told_when_every_byte_is_read(
    name: str, work: WorkDir, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.root.rglob("*")}
    assert "damaged  " not in say(work, capsys, "--verify")
    assert {path: path.stat().st_mtime_ns for path in work.root.rglob("*")} == before
    if not (work.data / name).exists():
        pytest.skip("this run has no such file")
    damage(work.data / name)
    assert "damaged  " not in say(work, capsys)
    assert f"damaged     {work.data / name} is damaged" in say(work, capsys, "--verify")
    os.truncate(work.data / name, 1)
    assert f"{name} has 1 bytes, " in say(work, capsys)


def test_a_run_that_was_stopped_knows_its_time_left(work: WorkDir) -> None:
    lines = (work.logs / "metrics.jsonl").read_text().splitlines()
    (work.logs / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    shutil.rmtree(work.step_times)
    found = status.read_status(work)
    assert found.state == "stopped"
    training = found.training
    assert training is not None
    assert (training.step, training.total_steps, training.val_loss) == (5, 8, json.loads(lines[3]).get("val_loss"))
    tokens_a_step = json.loads(lines[0])["tokens"]
    assert training.seconds_left == pytest.approx(3 * tokens_a_step / training.tokens_per_s)
    assert not training.with_pauses


def test_the_time_left_counts_pauses_that_are_recorded(work: WorkDir) -> None:
    lines = (work.logs / "metrics.jsonl").read_text().splitlines()
    (work.logs / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    parts = {"data_s": 0.5, "forward_s": 1.0, "backward_s": 2.0, "optimizer_s": 0.5, "save_s": 1.0, "eval_s": 0.0}
    events = [json.dumps({"step": step, **parts}) for step in range(1, 6)]
    (work.step_times / "rank-0.jsonl").write_text("\n".join(events) + "\n")
    training = status.read_status(work).training
    assert training is not None
    assert training.with_pauses
    assert training.seconds_left == pytest.approx(3 * 5.0)


@pytest.mark.parametrize(
    "content", ["", "\n", "not json\n", '{"step": 1}\n', '{"step": "x", "loss": [], "tokens": {}}\n']
)
def test_metrics_that_say_nothing(content: str, work: WorkDir, capsys: pytest.CaptureFixture[str]) -> None:
    (work.logs / "metrics.jsonl").write_text(content)
    assert "step        8 of 8" in say(work, capsys)  # as the checkpoint says
    shutil.rmtree(work.checkpoints)
    assert "step        none yet" in say(work, capsys)


def test_a_run_whose_logs_are_gone(work: WorkDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(say(work, capsys, "--json"))["training"]
    shutil.rmtree(work.logs)
    assert say(work, capsys).startswith("complete")
    after = json.loads(say(work, capsys, "--json"))["training"]
    assert {name for name in before if before[name] != after[name]} == {
        "loss", "tokens_per_s", "seconds_left", "with_pauses"
    }  # fmt: skip
    assert after["loss"] == before["last_loss"]
    shutil.rmtree(work.checkpoints)
    assert say(work, capsys).startswith("not started")


def test_a_launch_whose_scheduler_is_not_here(
    work: WorkDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = work.root / "launch" / "2026-01-01"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text('{"target": "slurm"}')
    (folder / "jobs").write_text("12\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    text = say(work, capsys)
    assert text.startswith("complete")
    assert "launch      squeue is not here" in text


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert cli.main(["status", str(path)]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith(f"rwkv-cluster: error: {path}: ")
        assert "there is no run" in sentence
