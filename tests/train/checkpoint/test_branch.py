"""Branches: the bits of a run that decays at once, nothing copied, nothing half made, and the tree in the report."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_page import Page, records
from tiny_run import tiny_run_config, write_text

from rwkv_cluster import cli
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.train.checkpoint.branch import read_parent
from rwkv_cluster.train.checkpoint.save_load import verify
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

pytestmark = pytest.mark.system  # runs of a second each

DECAY = ["--set", "training.schedule=wsd", "--set", "training.decay_steps=4", "--training.decay_shape=linear"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps at a constant rate, with checkpoints of 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("trunk")
    training = {"max_steps": 12, "schedule": "constant"}
    train(tiny_run_config(folder, training=training, checkpoint={"save_interval_steps": 4, "keep_last": 9}))
    return folder / "work"


def branch(trunk: Path, new: Path, *options: str, at: int = 8) -> int:
    return cli.main(["branch", str(trunk), str(new), "--at", str(at), *options])


def contents(work: Path, step: int) -> dict[str, bytes]:
    """What must be equal in two runs that are the same."""
    folder = work / "out" / "checkpoints" / f"step-{step:08d}"
    paths = (work / "out" / "rwkv-final.pth", folder / "weights.pth", folder / "optimizer.pth")
    return {path.name: path.read_bytes() for path in paths}


def test_a_branch_is_the_run_that_decays_at_once(trunk: Path, tmp_path: Path) -> None:
    assert branch(trunk, tmp_path / "branch", *DECAY) == 0
    assert cli.main(["train", str(tmp_path / "branch")]) == 0
    overrides = [f"work_dir={tmp_path}/once", *(item.removeprefix("--") for item in DECAY if "=" in item)]
    train(load_config(trunk / "configs" / "config.yaml", overrides))
    assert contents(tmp_path / "branch", 12) == contents(tmp_path / "once", 12)
    assert contents(tmp_path / "branch", 12) != contents(trunk, 12)

    def numbers(work: Path) -> list[Any]:
        return [[line[name] for name in ("step", "loss", "lr", "tokens", "grad_norm")] for line in records(work)]

    assert numbers(tmp_path / "branch") == numbers(tmp_path / "once")[8:]
    assert numbers(tmp_path / "once")[:8] == numbers(trunk)[:8]


def test_a_branch_of_an_adapter_has_its_base(tmp_path: Path) -> None:
    """Also where the file that the base came from is gone."""
    (tmp_path / "base").mkdir()
    train(tiny_run_config(tmp_path / "base", training={"max_steps": 1}))
    base = (tmp_path / "base" / "work" / "out" / "rwkv-final.pth").rename(tmp_path / "base.pth")
    training = {"max_steps": 8, "schedule": "constant", "init_from": str(base)}
    changes = {"adapter": {"kind": "lora", "rank": 2}, "checkpoint": {"save_interval_steps": 4, "keep_last": 9}}
    train(tiny_run_config(tmp_path, training=training, **changes))
    base.unlink()
    assert branch(tmp_path / "work", tmp_path / "branch", at=4) == 0
    assert cli.main(["train", str(tmp_path / "branch")]) == 0
    final = [(tmp_path / name / "out" / "rwkv-final.pth").read_bytes() for name in ("work", "branch")]
    assert final[0] == final[1]


def test_a_rate_that_does_not_go_on_is_told(trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "the learning rate of the last step was 0.001, and by the branch's schedule would be 0.000765"
    assert branch(trunk, tmp_path / "late", *DECAY) == 0
    assert words not in capsys.readouterr().err
    assert branch(trunk, tmp_path / "early", *DECAY, "--training.max_steps=10") == 0
    assert words in capsys.readouterr().err


def test_nothing_is_copied(trunk: Path, tmp_path: Path) -> None:
    assert branch(trunk, tmp_path / "branch") == 0
    new, folder = WorkDir(tmp_path / "branch"), "step-00000008"
    assert new.data.is_symlink()
    assert not os.path.isabs(os.readlink(new.data))
    assert new.data.resolve() == (trunk / "data").resolve()
    for path in (trunk / "out" / "checkpoints" / folder).iterdir():
        assert path.samefile(new.checkpoints / folder / path.name)
    assert read_parent(new).work_dir == str(trunk)
    assert [event["kind"] for event in records(new.root, "events.jsonl")] == ["branch"]
    assert load_config(new.config_yaml).work_dir == str(new.root)


def test_it_outlives_the_trunk_s_checkpoint(trunk: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    assert branch(work, tmp_path / "branch", "--training.max_steps=10") == 0
    shutil.rmtree(work / "out")
    assert cli.main(["train", str(tmp_path / "branch")]) == 0
    assert [line["step"] for line in records(tmp_path / "branch")] == [9, 10]


def test_another_disk_gets_copies(trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert branch(trunk, tmp_path / "branch") == 0
    old, new = (verify(work / "out/checkpoints/step-00000008") for work in (trunk, tmp_path / "branch"))
    assert not (old.path / "weights.pth").samefile(new.path / "weights.pth")
    assert old.state == new.state


@pytest.mark.parametrize(
    ("options", "at", "code", "words"),
    [
        ([], 5, 4, "Steps that are there: 4, 8, 12"),
        (["--model.n_layer=3"], 8, 2, "model.n_layer: 2 -> 3"),
        (["--training.max_steps=6"], 8, 4, "beyond this configuration's last step 6"),
        (["--data.order=all"], 8, 3, "order: None -> all"),
        (["--set", "training.schedul=wsd"], 8, 2, "Nearest: training.schedule"),
    ],
)
def test_what_would_not_go_on_is_refused_and_leaves_nothing(
    options: list[str], at: int, code: int, words: str, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert branch(trunk, tmp_path / "branch", *options, at=at) == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_is_left_alone(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "branch").mkdir()
    assert branch(trunk, tmp_path / "branch") == 2
    assert "exists already. Name a new directory" in capsys.readouterr().err
    assert list((tmp_path / "branch").iterdir()) == []


def test_a_full_disk_leaves_nothing(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    assert branch(trunk, tmp_path / "branch") == 4
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_trunk_s_data_is_not_prepared_anew(trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch(trunk, tmp_path / "branch") == 0
    shutil.rmtree(tmp_path / "branch/out/checkpoints/step-00000008")
    other = write_text(tmp_path / "other.jsonl", seed=1)
    before = (trunk / "data" / "train.bin").read_bytes()
    assert cli.main(["train", str(tmp_path / "branch"), f"--data.inputs=[{other}]"]) == 3
    assert "that this one has branched off" in capsys.readouterr().err
    assert (trunk / "data" / "train.bin").read_bytes() == before


def test_the_report_shows_the_tree(trunk: Path, tmp_path: Path) -> None:
    for old, new, at in ((trunk, "early", 4), (trunk, "late", 8), (tmp_path / "early", "twig", 4)):
        assert branch(old, tmp_path / new, at=at) == 0
    works = [tmp_path / "twig", trunk, tmp_path / "late", tmp_path / "early"]
    assert cli.main(["report", *map(str, works), "--output", str(tmp_path / "report")]) == 0
    source = Page(tmp_path / "report" / "index.html").source
    tree = source[source.index('<ul class="branches">') :].partition("</section>")[0]
    assert tree == (
        '<ul class="branches"><li>work<ul><li>early, from step 4 (512 tokens) on<ul><li>twig, from step 4 (512 tokens) '
        "on</li></ul></li><li>late, from step 8 (1.02k tokens) on</li></ul></li></ul>"
    )
    assert cli.main(["report", str(tmp_path / "late")]) == 0
    alone = Page(tmp_path / "late" / "report" / "index.html").source
    assert f'<ul class="branches"><li>{trunk}<ul><li>late' in alone


def test_an_altered_record_of_the_trunk_is_told(trunk: Path, tmp_path: Path) -> None:
    assert branch(trunk, tmp_path / "branch") == 0
    work = WorkDir(tmp_path / "branch")
    work.parent.write_text(json.dumps({**json.loads(work.parent.read_text()), "step": -1}))
    with pytest.raises(CheckpointError, match=r"parent.json: it was altered"):
        read_parent(work)
