"""`rwkv-cluster launch --doctor`: the same job, but doctor in place of training, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_cluster.cli import main
from rwkv_cluster.config import Config
from rwkv_cluster.launch.plan import plan


@pytest.mark.parametrize("target", ["local", "torchrun", "deepspeed", "podman", "sbatch", "slurm"])
def test_the_ranks_run_doctor(target: str, tmp_path: Path) -> None:
    launch = {"target": target, "container": {"image": "rwkv"}, "exclude_bad_nodes": True}
    config = Config(work_dir=str(tmp_path), launch=launch)
    script = plan(config, tmp_path, "doctor").files["job.sh"]
    trained = plan(config, tmp_path).files["job.sh"]
    assert script.count(' doctor "$PWD/config.yaml"') == 1
    assert ' train "$PWD' not in script
    assert "submitit" not in script
    assert 'requeue "$SLURM_JOB_ID"' not in script
    if target not in ("sbatch", "slurm"):
        assert script.replace(" doctor ", " train ") == trained


def test_a_sweep_is_examined_once(tmp_path: Path) -> None:
    launch = {"target": "slurm", "sweep": [{"training.lr_init": 1e-3}] * 3, "prepare": {"own_job": True}}
    made = plan(Config(work_dir=str(tmp_path), launch=launch), tmp_path, "doctor")
    assert made.members == ()
    assert [command.argv for command in made.commands] == [("sbatch", "--parsable", "job.sh")]


def test_it_is_a_word_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(f"work_dir: {tmp_path / 'work'}\n")
    assert main(["launch", str(tmp_path / "run.yaml"), "--doctor", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(' -m rwkv_cluster doctor "$PWD/config.yaml"\n')
