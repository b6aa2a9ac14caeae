"""Building a library: the manifest is true, the same inputs give the same bytes, and nothing is half-placed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build, loader


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build.build("cpu", tmp_path_factory.mktemp("built"))


def test_the_manifest_says_what_was_built_from_what(built: Path) -> None:
    manifest = json.loads((built.parent / "wkv_cpu.json").read_text())
    assert manifest["library"]["sha256"] == hashlib.sha256(built.read_bytes()).hexdigest()
    assert manifest["library"]["bytes"] == built.stat().st_size
    assert manifest["sources"]["cpu/wkv7.hpp"] == hashlib.sha256((build.CSRC / "cpu/wkv7.hpp").read_bytes()).hexdigest()
    assert manifest["abi"] == loader.open_library(built).rwkv_kernels_abi()
    assert "-DRWKV_TARGET=portable" in manifest["flags"]
    assert manifest["compiler"] == build.cpp_compiler().version
    assert sorted(path.name for path in built.parent.iterdir()) == ["libwkv_cpu.so", "wkv_cpu.json"]


def test_the_same_sources_elsewhere_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    csrc = tmp_path / "another place" / "csrc"
    shutil.copytree(build.CSRC, csrc)
    again = build.build("cpu", tmp_path / "output", csrc=csrc, jobs=1)
    assert again.read_bytes() == built.read_bytes()
    assert (again.parent / "wkv_cpu.json").read_text() == (built.parent / "wkv_cpu.json").read_text()


def test_broken_sources_leave_the_old_library_alone(built: Path, tmp_path: Path) -> None:
    output, csrc = tmp_path / "output", tmp_path / "csrc"
    shutil.copytree(built.parent, output)
    shutil.copytree(build.CSRC, csrc)
    (csrc / "cpu" / "capi.cpp").write_text("int broken(\n")
    with pytest.raises(build.BuildError, match=r"(?s)the compiler refused the sources:.*capi\.cpp"):
        build.build("cpu", output, csrc=csrc)
    assert (output / "libwkv_cpu.so").read_bytes() == built.read_bytes()
    assert sorted(path.name for path in output.iterdir()) == ["libwkv_cpu.so", "wkv_cpu.json"]


def test_no_compiler_is_one_sentence_and_exit_code_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build.main(["cpu", "--output", str(tmp_path)]) == 5
    assert capsys.readouterr().err == (
        "error: no C++ compiler: looked for CXX=/nonexistent/c++. Install one, e.g. `apt-get install g++`\n"
    )
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert build.main(["cuda", "--output", str(tmp_path)]) == 5
    assert "no nvcc: looked in CUDA_HOME=/nonexistent." in capsys.readouterr().err


def test_unknown_targets_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        build.main(["rocm"])
    assert "unknown target rocm; targets: cpu, cuda, host" in capsys.readouterr().err


def test_it_runs_as_a_command_and_says_what_it_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rwkv_cluster.kernels.build", "cpu", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{tmp_path}/libwkv_cpu.so: ")
