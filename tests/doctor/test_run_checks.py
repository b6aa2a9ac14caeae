"""`rwkv-cluster doctor`: a table or the first thing to fix; every row has its reason; a wrong kernel is not passed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.doctor.checks.image import image
from rwkv_cluster.doctor.checks.wkv import libraries, self_test, training_step
from rwkv_cluster.doctor.context import IMAGE_VARIABLE, CheckContext
from rwkv_cluster.doctor.results import Row
from rwkv_cluster.doctor.run_checks import CHECKS, OF_EACH_RANK
from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import build, loader
from rwkv_cluster.kernels import self_test as kernels_self_test
from rwkv_cluster.kernels.fused import native as fused_passes

ALWAYS = """
    rwkv-cluster python torch pytorch-lightning numpy flash-linear-attention driver CUDA DeepSpeed CPUs memory
    environment Slurm disk locks renames clock
""".split()  # noqa: SIM905 -- a list of words reads better
ALWAYS += ["WKV kernels, CPU", "C++ compiler", "nvcc", "DeepSpeed operators", "shared memory", "limit: open files"]
ALWAYS += ["limit: locked memory", "limit: stack", "container engines", "free space"]


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_the_shape_of_the_json_and_the_table(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["problem", "exit_code", "rows"]
    assert (found["problem"], found["exit_code"]) == (None, 0)
    fields = ["name", "state", "text", "remedy", "exit_code", "figure", "where"]
    assert all(list(row) == fields for row in found["rows"])
    assert {row["state"] for row in found["rows"]} <= {"ok", "note", "warning"}
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    assert set(ALWAYS) <= rows.keys()
    for backend in ("reference", "chunked", "native", "exact"):
        assert rows[f"self-test: {backend} on cpu, float32"]["state"] == "ok"
    assert rows["self-test: native on cpu, bfloat16"]["figure"] < 0
    assert rows["disk"]["figure"] > 0
    assert not list(tmp_path.iterdir())
    assert main(["doctor"]) == 0
    assert "ok       WKV kernels, CPU  " in capsys.readouterr().out


def test_a_run_that_can_start(tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path))
    assert main(["doctor", str(config), "--json", "--training.max_steps=3"]) == 0, capsys.readouterr().err
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["run"]["text"] == "1 rank on cpu, fp32, wkv_backend auto, 4 samples a step"
    assert rows["data"]["text"] == "1 file in data.inputs"
    assert {rows[name]["state"] for name in ("tokenizer", "data", "run", "room", "loggers", "initial weights")} == {
        "ok"
    }
    assert not (tmp_path / "work").exists()


def test_a_field_without_its_run_is_refused(capsys: Any) -> None:
    assert main(["doctor", "--training.zero_stage=2"]) == 2
    assert re.search(r"error: training\.zero_stage=2 .*CONFIG", capsys.readouterr().err)


def test_every_check_of_a_rank_is_a_check() -> None:
    assert set(CHECKS) >= OF_EACH_RANK
    assert len(set(CHECKS)) == len(CHECKS)


@pytest.mark.parametrize("with_config", [False, True])
def test_without_torch_it_is_the_first_thing_to_fix(with_config: bool, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is not here')\n")
    config = [str(write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path)))] if with_config else []
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "rwkv_cluster", "doctor", *config]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 6, done.stderr
    assert "error: torch cannot be imported: libcudart.so.13 is not here. Install it in this" in done.stderr
    assert "Traceback" not in done.stderr
    assert "problem  torch" in done.stdout
    assert "ok       WKV kernels, CPU" in done.stdout
    assert "ok       locks" in done.stdout


def test_a_missing_library_is_said_with_what_serves_instead(monkeypatch: Any) -> None:
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing compiled", "`build` builds them"))
    (row,) = libraries(CheckContext())
    assert (row.name, row.state, row.remedy) == ("WKV kernels, CPU", "warning", "`build` builds them")
    assert re.match(r"Nothing compiled\. .*PyTorch", row.text)
    assert not any("native" in row.name for row in self_test(CheckContext()))


def test_a_damaged_library_is_named_and_refused_by_a_run_that_wants_it(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Its manifest tells another checksum."""
    for name in (build.library_name("cpu"), build.manifest_name("cpu")):
        shutil.copy(loader.cpu().path.parent / name, tmp_path)  # type: ignore[union-attr]
    manifest = tmp_path / build.manifest_name("cpu")
    described = json.loads(manifest.read_text())
    described["library"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(described))
    monkeypatch.setattr(loader, "folders", lambda: [tmp_path])
    loader.cpu.cache_clear()
    try:
        (row,) = libraries(CheckContext())
        assert row.state == "warning"
        damaged = f"{tmp_path / build.library_name('cpu')} is not what"
        assert damaged in row.text
        assert row.remedy == "`python -m rwkv_cluster.kernels.build cpu` builds them"
        config = write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path, training={"wkv_backend": "native"}))
        assert main(["doctor", str(config)]) == 5
        assert damaged in capsys.readouterr().err
    finally:
        loader.cpu.cache_clear()


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_kernel_ends_it_with_exit_code_5(error: float, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(kernels_self_test, "run", lambda device: iter([("native", torch.float32, error, 5e-5)]))
    assert main(["doctor"]) == 5
    said = capsys.readouterr()
    assert f"error: The WKV backend native on cpu, float32 is wrong: relative error {error:.1e} where 5e-05" in said.err
    assert "problem  self-test: native on cpu, float32" in said.out
    assert "ok       locks" in said.out


DRIVER = "CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize("error", [KernelError(f"rwkv_wkv7_forward failed: {DRIVER}"), RuntimeError(DRIVER)])
def test_a_device_that_fails_is_a_row_and_the_examination_goes_on(error: Exception, monkeypatch: Any) -> None:
    def failing(device: str) -> Iterator[tuple[str, torch.dtype, float, float]]:
        yield "chunked", torch.float32, 1e-7, 5e-5
        raise error

    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(kernels_self_test, "run", failing)
    right, wrong = self_test(CheckContext())
    assert (right.state, wrong.state) == ("ok", "problem")
    assert wrong.text.startswith("The WKV backends on cpu failed: ")
    assert wrong.text.endswith(DRIVER)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_a_wrong_pass_is_found_by_a_step(monkeypatch: Any) -> None:
    right = fused_passes.squared_relu
    monkeypatch.setattr(fused_passes, "squared_relu", lambda x: right(x) * 1.5)
    rows = training_step(CheckContext())
    assert [row.state for row in rows] == ["problem"] * len(rows) == ["problem"] * 6
    said = rf"The gradient of a step of {rows[0].name.split()[4]} on cpu, float32 is wrong: relative error .* allowed"
    assert re.fullmatch(said, rows[0].text)


def test_an_image_says_what_is_in_it(monkeypatch: Any, tmp_path: Path) -> None:
    described = tmp_path / "contents.json"
    monkeypatch.setenv(IMAGE_VARIABLE, str(described))
    contents = {"variant": "cuda", "revision": "abc", "packages": 7, "sbom": "/bill.json"}
    described.write_text(json.dumps(contents | {"kernels": {"cpu": [], "cuda": ["sm_90", "compute_90"]}}))
    rows = by_name(image(CheckContext()))
    assert rows["image"].text == "variant cuda, revision abc"
    assert rows["image: WKV kernels"].text == "cpu, cuda sm_90 compute_90"
    assert rows["image: packages"].text == "7, listed in /bill.json"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"kernels": []}'])
def test_an_image_whose_description_is_damaged_is_said(text: str | None, monkeypatch: Any, tmp_path: Path) -> None:
    described = tmp_path / "contents.json"
    monkeypatch.setenv(IMAGE_VARIABLE, str(described))
    if text is not None:
        described.write_text(text)
    (row,) = image(CheckContext())
    assert row.state == "warning"
    assert f"{described}, which RWKV_CLUSTER_IMAGE names, cannot be read" in row.text
