"""With CONFIG doctor finds what the run would be refused for, with the exit code that training would have."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.doctor.checks import run_requirements, tools
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import first_problem
from rwkv_cluster.errors import RWKVClusterError
from rwkv_cluster.kernels import loader
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.train.checkpoint import disk_space
from rwkv_cluster.workdir import WorkDir

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def first(folder: Path, **sections: dict[str, Any]) -> RWKVClusterError:
    """The first problem of a run with these changes."""
    context = CheckContext(tiny_run_config(folder, **sections))
    found = first_problem([*tools.launch_tools(context), *run_requirements.run_needs(context)])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("sections", "code", "says"),
    [
        ({"data": {"inputs": ["nothing-*.txt"]}}, 3, "data.inputs: 'nothing-*.txt' does not exist"),
        ({"data": {"inputs": []}}, 3, "manifest.json"),
        ({"data": {"tokenizer": {"type": "generic", "vocab_file": "none.txt"}}}, 3, "none.txt"),
        ({"data": {"tokenizer": {"type": "no.such:Tokenizer"}}}, 2, "no.such:Tokenizer"),
        ({"model": {"vocab_size": 100}}, 2, "model.vocab_size is 100"),
        ({"training": {"init_from": "none.pth"}}, 4, "none.pth: no such weights"),
        ({"launch": {"gpus_per_node": 2}}, 6, "has 0 GPUs, but launch.gpus_per_node is 2"),
        pytest.param({"training": {"accelerator": "cuda"}}, 2, "finds no CUDA device", marks=NO_CUDA),
        pytest.param({"training": {"precision": "fp16"}}, 2, "needs a CUDA device", marks=NO_CUDA),
    ],
)
def test_what_the_run_asks_for(
    sections: dict[str, Any], code: int, says: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    values = {name: dict(changes) for name, changes in sections.items()}
    error = first(tmp_path, **values)
    assert says in str(error)
    assert error.exit_code == code


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("rwkv_cluster.train.metrics.loggers.importlib.util.find_spec", lambda name: None)
    error = first(tmp_path, logging={"wandb_project": "x"})
    assert error.exit_code == 2
    assert "the package wandb is not installed" in str(error)


def test_deepspeed_that_cannot_be_imported(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", None)
    error = first(tmp_path, training={"zero_stage": 2})
    assert error.exit_code == 2
    assert "ZeRO stage 2 needs the package deepspeed" in str(error)


def test_kernels_that_are_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("No library", "Build it"))
    error = first(tmp_path, training={"wkv_backend": "native"})
    assert error.exit_code == 5
    assert "No library" in str(error)


@pytest.mark.parametrize("target", ["docker", "podman", "sbatch", "slurm"])
def test_a_program_that_the_launch_needs(target: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launch = {"target": target, "container": {"image": "rwkv"}}
    error = first(tmp_path, launch=launch)
    assert error.exit_code == 6
    assert f"launch.target is {target}, but `" in str(error)


def test_what_runs_elsewhere_is_not_asked_of_this_machine(tmp_path: Path, monkeypatch: Any) -> None:
    config = tiny_run_config(
        tmp_path, training={"accelerator": "cuda"}, launch={"target": "sbatch", "gpus_per_node": 8}
    )
    rows = run_requirements.run_needs(CheckContext(config))
    assert [row.state for row in rows] == ["ok", "ok", "note"]
    assert "--doctor" in rows[-1].remedy
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # now this is where the ranks run
    assert first_problem(run_requirements.run_needs(CheckContext(config))) is not None
    assert tools.launch_tools(CheckContext(config)) == []


def test_room_for_the_next_checkpoint_and_for_those_kept(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, checkpoint={"keep_last": 10_000_000}))
    assert main(["doctor", str(config)]) == 0
    table = capsys.readouterr().out
    assert "warning  room" in table
    assert "will not fit" in table
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 1000)
    assert main(["doctor", str(config)]) == 4
    assert re.search(r"no room for .*checkpoint.* [\d,]+ bytes and 1,000 ", capsys.readouterr().err)


def test_inputs_that_are_gone_after_they_were_prepared(tmp_path: Path) -> None:
    config = tiny_run_config(tmp_path)
    n_tokens = prepare(config.data, ByteTokenizer(), WorkDir(config.work_dir).data).n_tokens
    (tmp_path / "text.jsonl").unlink()
    assert re.fullmatch(f"prepared: {n_tokens:,} tokens, .* gone", run_requirements._data(config))


def test_an_input_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,a\n")
    assert "a.csv is a table" in str(first(tmp_path, data={"inputs": [str(tmp_path / "a.csv")]}))
