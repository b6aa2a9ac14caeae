"""launch, status, logs and cancel on this machine, as a user types them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch import jobs
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.launch.launchers.slurm import Slurm
from rwkv_cluster.runtime.heartbeat import this_process


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rwkv_cluster", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.system
def test_a_local_launch_is_followed_and_leaves_private_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"max_steps": 2}))
    dry = run(tmp_path, "launch", "run.yaml", "--dry-run")
    assert not (tmp_path / "work").exists()
    done = run(tmp_path, "launch", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "done: step 2 of 2" in done.stdout
    (folder,) = (tmp_path / "work/launch").iterdir()
    assert (folder / "job.sh").read_text() == dry.stdout  # H4
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("job.sh", "config.yaml", "command.json", "rank-0.log"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    work = str(tmp_path / "work")
    assert cli.main(["status", work]) == 0
    said = capsys.readouterr().out
    assert said.startswith("complete  ")
    assert "ended  local, exit code 0" in said
    assert cli.main(["logs", work, "--rank", "0", "-f"]) == 0
    assert "done: step 2 of 2" in capsys.readouterr().out
    assert cli.main(["cancel", work]) == 0
    assert capsys.readouterr().out.startswith("ended")
    assert cli.main(["logs", work, "--rank", "5"]) == 6
    assert "rank 5 has not started" in capsys.readouterr().err


@pytest.mark.system
def test_the_exit_code_is_the_ranks(tmp_path: Path) -> None:
    """C10."""
    write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    with open(tmp_path / "text.jsonl", "a") as handle:
        handle.write('{"text": 5}\n')
    done = run(tmp_path, "launch", "run.yaml", "--target", "torchrun", "--launch.ranks_per_node=2")
    assert done.returncode == 3
    assert "rank 0 on" in done.stderr
    assert "failed (data)" in done.stderr


def test_a_work_dir_without_a_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("logs", "cancel"):
        assert cli.main([verb, str(tmp_path)]) == 6
        assert "has no launch" in capsys.readouterr().err


def test_slurm_that_is_not_here_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    assert cli.main(["launch", str(path), "--target=sbatch"]) == 6
    assert "sbatch is not here. Launch on a machine of the cluster" in capsys.readouterr().err
    assert os.environ["PATH"] == str(tmp_path)


JOB = "JobName=a JobState=COMPLETED JobState=RUNNING Comment=try lr=1 JobState=COMPLETED WorkDir=/x JobState=FAILED"


def slurm_that_says(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str) -> Path:
    """A launch directory on a cluster of stubs. squeue: what its program does; all write down how they were called."""
    programs = folder / "bin"
    programs.mkdir()
    bodies = {"squeue": squeue, "scontrol": f"echo '{JOB}'", "scancel": "", "sacct": "exit 1"}
    for name, body in bodies.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{body}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    launch = folder / "launch"
    launch.mkdir()
    (launch / "command.json").write_text('{"target": "sbatch"}')
    (launch / "jobs").write_text("7\n")
    return launch


@pytest.mark.parametrize("reason", ["None", "a|b JobState=COMPLETED|"])
def test_what_a_user_writes_is_no_state_of_a_job(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm_that_says(tmp_path, monkeypatch, f"echo 'N/A|RUNNING|2|0|1:00|node1|{reason}|'")
    found = jobs.status(folder)
    assert (found.state, found.has_ended) == ("RUNNING", False)
    assert "Restarts 2" in found.detail


def test_a_job_that_goes_on_is_not_called_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm_that_says(tmp_path, monkeypatch, "echo 'N/A|COMPLETING|0|0|1:00|node1|None|'")
    monkeypatch.setitem(LAUNCHERS, "sbatch", Slurm(end_s=0.0))
    with pytest.raises(LaunchError, match="it is COMPLETING still"):
        jobs.cancel(folder, grace_s=0)
    assert "scancel 7" in (tmp_path / "calls").read_text()


def test_a_controller_that_does_not_answer_has_not_forgotten_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = slurm_that_says(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(LaunchError, match="squeue failed: Unable to contact slurm controller"):
        jobs.status(folder)


def test_a_job_that_slurm_no_longer_knows_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm_that_says(tmp_path, monkeypatch, "echo 'error: Invalid job id specified' >&2; exit 1")
    assert jobs.status(folder).has_ended


def test_a_users_own_settings_of_squeue_hide_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    squeue = 'test -z "$SQUEUE_PARTITION" && echo "N/A|RUNNING|0|0|1:00|node1|None|"'
    assert jobs.status(slurm_that_says(tmp_path, monkeypatch, squeue)).state == "RUNNING"


def test_an_exit_code_reads_as_in_slurms_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm_that_says(tmp_path, monkeypatch, "echo 'N/A|FAILED|0|19200|1:00|node1|NonZeroExitCode|'")
    assert "ExitCode 75:0" in jobs.status(folder).detail


NOBODY = 65534


@contextmanager
def as_somebody_else() -> Iterator[None]:
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The work directory `work`, with a launch that only its owner may see, and a folder that others cannot enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.chdir(name)
        os.chmod(name, 0o755)
        Path("work/launch/1").mkdir(parents=True)
        Path("work/launch/1/command.json").write_text('{"target": "local"}')
        os.chmod("work/launch", 0o700)
        os.mkdir("locked", 0o700)
        write_config(Path("run.yaml"), tiny_run_config(Path(name)))
        for command in (["status", "work"], ["launch", "run.yaml", "--dry-run"], ["inspect", "absent.pth"]):
            cli.main(command)  # so that all is imported
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else takes root")
def test_what_somebody_else_has_launched_is_told_with_the_owner(
    theirs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    sentence = f"{theirs}/work/launch belongs to root"
    with as_somebody_else():
        for verb in ("logs", "cancel"):
            assert cli.main([verb, "work"]) == 6
            assert sentence in capfd.readouterr().err
        assert cli.main(["status", "work"]) == 0
        assert sentence in capfd.readouterr().out
        assert cli.main(["launch", "run.yaml"]) == 6
        denied = f"Operation not permitted at {theirs}/work/launch; {theirs}/work/launch belongs to root"
        assert denied in capfd.readouterr().err
        for command in (["status", "locked/w"], ["config", "locked/w"], ["inspect", "locked/x.pth"]):
            assert cli.main(command) == 2
            assert "locked belongs to root" in capfd.readouterr().err


DEEP = "[" * 100_000
PROCESS = json.dumps({"launcher": this_process(), **this_process()})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"command.json": DEEP}, "command.json cannot be read"),
        ({"command.json": "[]"}, "command.json cannot be read"),
        (
            {"command.json": '{"target": "/tmp/evil"}', "process.json": PROCESS},
            "names '/tmp/evil', which is no",
        ),
        ({"process.json": DEEP}, "process.json cannot be read"),
        ({"process.json": PROCESS.replace('"pid": ', '"pid": -')}, "process.json does not say which process"),
        ({"command.json": '{"target": "sbatch"}', "jobs": "--user=me"}, "jobs holds '--user=me', expected numbers"),
        ({"command.json": '{"target": "sbatch"}', "jobs": ""}, "jobs holds '', expected numbers"),
        ({"command.json": '{"target": "docker"}', "container.id": "--all", "process.json": PROCESS}, "holds '--all'"),
    ],
)
def test_records_of_a_launch_name_no_other_program_job_or_process(
    files: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "launch/1"
    folder.mkdir(parents=True)
    for name, content in {"command.json": '{"target": "local"}', **files}.items():
        (folder / name).write_text(content)
    assert cli.main(["cancel", str(tmp_path)]) == 6
    assert said in capsys.readouterr().err
