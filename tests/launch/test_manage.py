"""launch, status, logs and cancel on this machine, as a user types them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_config, write_config

from rwkv_cluster import cli


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rwkv_cluster", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_local_launch_is_followed_and_leaves_private_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "run.yaml", tiny_config(tmp_path, training={"max_steps": 2}))
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


def test_the_exit_code_is_the_ranks(tmp_path: Path) -> None:
    """C10."""
    write_config(tmp_path / "run.yaml", tiny_config(tmp_path))
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
    path = write_config(tmp_path / "run.yaml", tiny_config(tmp_path))
    assert cli.main(["launch", str(path), "--target=sbatch"]) == 6
    assert "sbatch is not here. Launch on a machine of the cluster" in capsys.readouterr().err
    assert os.environ["PATH"] == str(tmp_path)
