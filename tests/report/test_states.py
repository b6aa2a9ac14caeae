"""Reports on directories that lack files, on one step, on a million, on values that are no numbers; comparisons."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import Page, records
from tiny_run import tiny_run_config

from rwkv_cluster import cli
from rwkv_cluster.report import draw, run_data, series
from rwkv_cluster.report.draw import short, tick_labels
from rwkv_cluster.train.run import train
from rwkv_cluster.workdir import WorkDir

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_run_config(folder, training={"max_steps": 3}, data={"validation_fraction": 0.0}))
    return folder / "work"


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "work"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """PNGs are looked at in test_report.py."""
    monkeypatch.setattr(draw, "png", lambda chart, theme, end: b"")


def report(*works: Path) -> Page:
    assert cli.main(["report", *map(str, works)]) == 0
    return Page(works[0] / "report" / "index.html")


def step_line(step: int, **values: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 2 + 3 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 128}
    return {**line, "tokens_per_s": 1000.0, "memory_mb": 500.0, **values}


def made_up(work: Path, lines: list[dict[str, Any]]) -> Path:
    (work / "logs").mkdir(parents=True, exist_ok=True)
    (work / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return work


def test_what_is_missing_is_said(work: Path) -> None:
    files = {
        "logs/events.jsonl": "resumes and other events: ",
        "logs/events": "parts of a step: ",
        "logs/environment.json": "environment: ",
        "configs/config.yaml": "configuration: ",
        "data/manifest.json": "data: ",
        "out/checkpoints": "checkpoints: ",
    }
    for name in files:
        shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink()
    page = report(work)
    assert all(f"{what}{work / name}" in page.text for name, what in files.items())
    assert 'id="chart-loss"' in page.source


def test_no_metrics(work: Path) -> None:
    (work / "logs" / "metrics.jsonl").unlink()
    page = report(work)
    assert f"curves: {work}/logs/metrics.jsonl: No such file or directory" in page.text
    assert "<figure" not in page.source
    assert "training.max_steps3" in page.text


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]\nnull\n\xff\xfe{}\n", b'{"step": "one", "sessions": 5}\n'])
def test_damaged_files_are_no_obstacle(content: bytes, work: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "environment.json", "events/rank-0.jsonl"):
        (work / "logs" / name).write_bytes(content)
    report(work)


def test_no_validation(work: Path) -> None:
    page = report(work)
    assert page.series("val_loss")["value"] == []
    assert "has no val_loss" in page.text


def test_one_step(tmp_path: Path) -> None:
    page = report(made_up(tmp_path / "work", [step_line(1)]))
    assert page.series("loss")["value"] == [5.0]
    assert 'id="chart-memory_mb"' in page.source


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    lines = [step_line(step) for step in range(1, 101)]
    lines[3]["loss"], lines[6]["loss"], lines[4]["grad_norm"] = float("nan"), float("inf"), None
    lines[5]["lr"], lines[7]["memory_mb"], lines[8]["tokens_per_s"] = "fast", [], 10**400
    lines[9]["loss"] = 1e12
    page = report(made_up(tmp_path / "work", lines))
    loss = page.series("loss")["value"]
    assert (loss[3], loss[6], loss[9]) == (None, None, 1e12)
    assert page.series("grad_norm")["value"][4] is None
    assert page.series("lr")["value"][5] is None
    assert page.series("tokens_per_s")["value"][8] is None
    assert "not finite (2)" in page.text
    assert "values up to 1T are cut off" in page.text


@pytest.mark.parametrize("place", [slice(0, 1), slice(-1, None)], ids=["first", "last"])
def test_values_that_begin_late_or_end_early(place: slice, tmp_path: Path) -> None:
    """MFU is known from the moment on that the devices' peak is; a norm is none where fp16 skips the update."""
    lines = [step_line(step, mfu=0.4) for step in range(1, 5)]
    for line in lines[place]:
        line |= dict.fromkeys(("mfu", "grad_norm", "memory_mb", "tokens_per_s", "lr", "loss"))
    page = report(made_up(tmp_path / "work", lines))
    assert "nan" not in page.source
    assert "MFU over tokens: each step from 0.4 to 0.4" in page.source


def test_a_long_run_is_thinned_and_keeps_its_extremes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [step_line(step, loss=value) for step, value in enumerate(2 + rng.random(20_000) / 10, 1)]
    lines[12_345]["loss"], lines[777]["loss"] = 9.5, 0.25
    work = made_up(tmp_path / "work", lines)
    (work / "logs" / "events").mkdir()
    parts = {"data_s": 0.25, "forward_s": 1.0, "backward_s": 2.0, "optimizer_s": 0.5, "save_s": 0.0, "eval_s": 0.0}
    text = "".join(json.dumps({"step": step, **parts}) + "\n" for step in range(1, 20_001))
    (work / "logs" / "events" / "rank-0.jsonl").write_text(text)
    page = report(work)
    loss = page.series("loss")
    assert loss["n_records"] == 20_000
    assert len(loss["value"]) <= series.MOST_POINTS
    assert all(lines[step - 1]["loss"] == value for step, value in zip(loss["step"], loss["value"], strict=True))
    assert {9.5, 0.25, lines[0]["loss"], lines[-1]["loss"]} <= set(loss["value"])
    bars = page.series("step_parts")
    assert len(bars["step"]) <= series.MOST_BARS
    assert set(bars["forward_s"]) == {1.0}
    assert len(page.source) < 2_000_000


def test_long_files_of_step_times_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = made_up(tmp_path / "work", [step_line(step) for step in range(1, 10_001)])
    (work / "logs" / "events").mkdir()
    text = "".join(json.dumps({"step": step, "forward_s": 0.5}) + "\n" for step in range(1, 10_001))
    (work / "logs" / "events" / "rank-0.jsonl").write_text(text)
    monkeypatch.setattr(run_data, "MOST_BYTES", len(text) // 4)
    monkeypatch.setattr("rwkv_cluster.report.run_files.PIECE_BYTES", len(text) // 40)
    (run,) = run_data.read_runs([WorkDir(work)])
    assert "sums are estimates" in run.missing[1]
    assert 2_000 < len(run.parts["step"]) < 3_000
    assert run.parts["step"][-1] > 9_000
    assert run.rank_totals[0]["forward_s"] == pytest.approx(5_000, rel=0.05)


def test_thinning_keeps_what_is_not_a_number() -> None:
    values = np.arange(10_000.0)
    values[5_000] = np.nan
    kept = series.thin(values, 100)
    assert len(kept) <= 100
    assert 5_000 in kept
    assert (np.diff(kept) > 0).all()


def test_smoothing_has_no_start_up_bias() -> None:
    columns = {"step": np.arange(1.0, 41), "tokens": np.arange(1.0, 41), "loss": np.full(40, 3.0)}
    columns["loss"][10] = np.nan
    assert np.allclose(series.smoothed(columns, "loss").value, 3.0)


def test_several_runs_show_what_differs(work: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(work, tmp_path / "two" / "work"))
    path = other / "configs" / "config.yaml"
    path.write_text(path.read_text().replace("lr_init: 0.001", "lr_init: 0.002"))
    page = report(work, other)
    names = [run["name"] for run in page.numbers["runs"]]
    assert names == ["work", "two/work"]
    (table,) = tables(page.source, "Configuration: fields that differ")
    assert [row[0] for row in table] == ["field", "training.lr_init"]
    assert table[1][1:] == ["0.001", "0.002"]
    for number in (0, 1):
        assert page.series("loss", number)["value"] == [line["loss"] for line in records(work)]


def tables(source: str, label: str) -> list[list[list[str]]]:
    """Cells of the tables with that label."""
    found = re.findall(rf'aria-label="{re.escape(label)}"><table>(.*?)</table>', source, re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in found]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table] for table in rows]


def test_json_names_what_was_made(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(work), "--output", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(tmp_path / "out" / "index.html")
    assert all(Path(image).parent == tmp_path / "out" and Path(image).exists() for image in found["images"])
    assert "has no val_loss" in found["missing"][str(work)][0]


def test_mistakes_are_one_sentence(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ([tmp_path / "nothing"], f"{tmp_path}/nothing: there is no run"),
        ([work, work], f"{work} is named twice"),
        ([work, "--output", tmp_path / "file"], f"cannot be written to {tmp_path}/file"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_without_matplotlib(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(work)]) == 2
    assert "pip install 'rwkv-cluster[report]'" in capsys.readouterr().err


def test_torch_is_not_needed(work: Path) -> None:
    code = f"from rwkv_cluster.cli import main; assert main(['report', {str(work)!r}]) == 0"
    check = "import sys; assert not {'torch', 'pytorch_lightning'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 250_000, 500_000], ["0", "250k", "500k"]),
        ([0, 5e8, 1e9, 1.5e9], ["0", "500M", "1B", "1.5B"]),
        ([0, 5e-4, 1e-3, 1.5e-3], ["0", "5e-4", "1e-3", "1.5e-3"]),
        ([733.1, 733.15, 733.2], ["733.1", "733.15", "733.2"]),
        ([1, 10, 100, 1000], ["1", "10", "100", "1k"]),
        ([-1, 0, 1], ["-1", "0", "1"]),
        ([5], ["5"]),
        ([], []),
    ],
)
def test_tick_labels(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


def test_short_numbers() -> None:
    values = (8774.4, 1_024_000, 0.0015, 2e-4, 0, 999_999, 1e13)
    assert [short(value) for value in values] == ["8.77k", "1.02M", "0.0015", "2e-4", "0", "1M", "10T"]
