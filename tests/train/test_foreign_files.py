"""Another program's files are not overwritten; whatever a run has left, at any moment, is never taken for such."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import RWKVTrainingPipeline
from rwkv_cluster.cli import main
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.train.foreign_files import _TOKEN_FILES, overwritten, require_no_foreign_files
from rwkv_cluster.workdir import WorkDir

NOWHERE = WorkDir("/nowhere")
NAMES = [str(path.relative_to(NOWHERE.root)) for path in (*overwritten(NOWHERE), NOWHERE.weights(0))]
NAMES += [f"data/{name}" for name in _TOKEN_FILES]


def put(work: WorkDir, name: str) -> Path:
    path = work.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    return WorkDir(tmp_path / "work")


@pytest.mark.parametrize("name", NAMES)
def test_each_name_that_a_run_overwrites_is_enough(name: str, work: WorkDir) -> None:
    put(work, name)
    with pytest.raises(ConfigError, match=f"work_dir {work.root} .*overwrite them: {name}"):
        require_no_foreign_files(work, ["text.jsonl"])


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["notes.txt", "data/corpus.txt", "out/plot.png", "data/text.jsonl"],
        ["data/vocab.txt", "out/rwkv-init.pth"],
        *([".lock", name] for name in NAMES),
        ["data/.prepare.lock", "data/train.bin"],
        ["out/checkpoints/step-00000004/manifest.json", "logs/metrics.csv"],
    ],
    ids=str,
)
def test_nothing_of_it_or_one_sign_of_a_run_is_no_obstacle(names: list[str], work: WorkDir) -> None:
    for name in names:
        put(work, name)
    require_no_foreign_files(work, ["text.jsonl"])


@pytest.mark.parametrize(
    "entry",
    ["work/data/train", "work/data/train.bin", "work/data", "work/data/*.bin", "work/*/train.bin", "~/work/data", "."],
)
def test_inputs_in_data_are_the_users_own(
    entry: str, work: WorkDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    put(work, "data/train.bin")
    require_no_foreign_files(work, ["elsewhere", entry])
    with pytest.raises(ConfigError, match=r"data/train\.bin"):
        require_no_foreign_files(work, ["elsewhere", "stdlib:", "a\0b", "work/database/train"])


def test_weights_that_the_run_starts_from_are_the_users_own(work: WorkDir) -> None:
    path = put(work, "out/rwkv-7.pth")
    require_no_foreign_files(work, [], str(path))
    with pytest.raises(ConfigError, match=r"out/rwkv-7\.pth"):
        require_no_foreign_files(work, [], "other.pth")


def test_a_refused_directory_stays_as_it_was(tmp_path: Path, work: WorkDir, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    for name in NAMES:
        put(work, name)
    before = sorted(work.root.rglob("*"))
    for verb in ("train", "prepare", "init"):
        assert main([verb, str(path)]) == 2
        assert "configs/config.yaml, configs/config.json, data/manifest.json, " in capfd.readouterr().err
    assert sorted(work.root.rglob("*")) == before
    assert all((work.root / name).read_text() == "mine" for name in NAMES)


def test_the_pipeline_refuses_too_and_takes_a_pair_in_its_data(tmp_path: Path, work: WorkDir) -> None:
    put(work, "logs/metrics.jsonl")
    with pytest.raises(ConfigError, match=r"logs/metrics\.jsonl"):
        RWKVTrainingPipeline(work.root)
    assert not (work.root / "configs/config.yaml").exists()
    made = RWKVTrainingPipeline(tmp_path / "made")
    made.prepare_data(np.arange(300) % 9)
    there = WorkDir(tmp_path / "there")
    there.data.mkdir(parents=True)
    for suffix in ("bin", "idx"):
        shutil.copy(tmp_path / f"made/data/train.{suffix}", there.data)
    pipeline = RWKVTrainingPipeline(there.root)
    pipeline.use_existing_data(there.data / "train", None, None)
    assert pipeline.data_prefix == there.data / "train"


def test_a_work_directory_copied_without_hidden_files_is_known(tmp_path: Path, work: WorkDir) -> None:
    config = tiny_run_config(tmp_path, training={"max_steps": 1})
    path = write_config(tmp_path / "run.yaml", config)
    assert main(["prepare", str(path)]) == 0
    for name in (".lock", "data/.prepare.lock"):
        os.remove(work.root / name)
    assert main(["train", str(path)]) == 0
    os.remove(work.root / ".lock")
    os.remove(work.data / "manifest.json")
    shutil.rmtree(work.checkpoints)
    require_no_foreign_files(work, config.data.inputs)  # by configs/config.yaml
