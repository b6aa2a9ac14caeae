"""`rwkv-cluster lr-find`: the run's own first step, a suggestion, a picture, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from report_page import records
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.bench.lr_range import RangeTest
from rwkv_cluster.train.run import train

Capture = pytest.CaptureFixture[str]


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss() -> None:
    test = RangeTest([10.0**-exponent for exponent in range(6, 0, -1)], [5.0, 4.0, 3.0, 2.0, 9.0, 20.0])
    assert test.smoothed[0] == 5.0
    assert test.smoothed[1] == pytest.approx((0.8 * 5 + 4) / 1.8)
    assert (test.lowest_at, test.suggestion) == (1e-3, 1e-4)
    lines = test.text().splitlines()
    assert [line.count("#") for line in lines[1:6]] == [1, 1, 1, 3, 5]
    assert lines[-1].endswith("--training.lr_init=0.0001")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    path = write_config(folder / "run.yaml", tiny_run_config(folder, training={"global_batch_size": 8}))
    assert cli.main(["prepare", str(path)]) == 0
    return folder


def _content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.mark.system
def test_it_begins_like_the_run_and_leaves_nothing(prepared: Path, capsys: Capture) -> None:
    before = _content(prepared)
    capsys.readouterr()
    command = ["lr-find", str(prepared / "run.yaml"), "--from", "1e-5", "--to", "10", "--steps", "40"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert _content(prepared) == before
    assert found["rates"][:2] == pytest.approx([1e-5, 1e-5 * 1e6 ** (1 / 39)])
    assert found["rates"][0] < found["lowest_at"] < found["rates"][-1]
    assert found["losses"][-1] > min(found["losses"])
    assert cli.main([*command, "--training.ema_decay=0.9", "--training.strategy=ddp", "--training.optimizer=muon"]) == 0
    assert "a tenth of that: --training.lr_init=" in capsys.readouterr().out
    assert _content(prepared) == before
    train(tiny_run_config(prepared, training={"global_batch_size": 8, "max_steps": 1}))
    assert found["losses"][0] == pytest.approx(records(prepared / "work")[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--from", "1", "--to", "0.1"], 2, "rates from 1 to 0.1 in 100 steps are no range"),
        (["--training.precision=fp16"], 2, "Add --training.precision=bf16"),
        (["--work_dir=elsewhere"], 3, "the data is not prepared"),
    ],
)
def test_refusals(
    options: list[str], code: int, words: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(prepared)
    before = _content(prepared)
    assert cli.main(["lr-find", "run.yaml", *options]) == code
    assert words in capsys.readouterr().err
    assert _content(prepared) == before
