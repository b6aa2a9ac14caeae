"""Building a library: the manifest is true, the same inputs give the same bytes, and nothing is half-placed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build, loader


def test_the_manifest_says_what_was_built_from_what(cpu_library: Path) -> None:
    manifest = json.loads((cpu_library.parent / "wkv_cpu.json").read_text())
    assert manifest["library"]["sha256"] == hashlib.sha256(cpu_library.read_bytes()).hexdigest()
    assert manifest["library"]["bytes"] == cpu_library.stat().st_size
    assert manifest["sources"]["cpu/wkv7.hpp"] == hashlib.sha256((build.CSRC / "cpu/wkv7.hpp").read_bytes()).hexdigest()
    assert manifest["abi"] == loader.open_library(cpu_library).rwkv_kernels_abi()
    assert "-DRWKV_TARGET=portable" in manifest["flags"]
    assert manifest["compiler"] == build.cpp_compiler().version
    assert sorted(path.name for path in cpu_library.parent.iterdir()) == ["libwkv_cpu.so", "wkv_cpu.json"]


@pytest.mark.system
def test_the_same_sources_elsewhere_give_the_same_bytes(cpu_library: Path, tmp_path: Path) -> None:
    csrc = tmp_path / "another place" / "csrc"
    shutil.copytree(build.CSRC, csrc)
    told: list[tuple[int, int]] = []
    again = build.build("cpu", tmp_path / "output", csrc=csrc, report=lambda *counts: told.append(counts))
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    assert again.read_bytes() == cpu_library.read_bytes()
    assert (again.parent / "wkv_cpu.json").read_text() == (cpu_library.parent / "wkv_cpu.json").read_text()


def test_broken_sources_leave_the_old_library_alone(cpu_library: Path, tmp_path: Path) -> None:
    output, csrc = tmp_path / "output", tmp_path / "csrc"
    shutil.copytree(cpu_library.parent, output)
    shutil.copytree(build.CSRC, csrc)
    for source in (csrc / "cpu").glob("*.cpp"):
        source.write_text("int broken(\n")
    with pytest.raises(build.BuildError, match=r"(?s)compiler refused .*\.cpp"):
        build.build("cpu", output, csrc=csrc)
    assert (output / "libwkv_cpu.so").read_bytes() == cpu_library.read_bytes()
    assert sorted(path.name for path in output.iterdir()) == ["libwkv_cpu.so", "wkv_cpu.json"]


def test_no_compiler_is_one_sentence_and_exit_code_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build.main(["cpu", "--output", str(tmp_path)]) == 5
    said = r"error: no C\+\+ compiler: .*CXX=/nonexistent/c\+\+\. .*`apt-get install g\+\+`\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert build.main(["cuda", "--output", str(tmp_path)]) == 5
    assert "no nvcc: looked in CUDA_HOME=/nonexistent." in capsys.readouterr().err


@pytest.mark.parametrize(("target", "is_x86"), [("aarch64-linux-gnu", False), ("x86_64-pc-linux", True)])
def test_the_compiler_says_which_machine_it_compiles_for(
    monkeypatch, tmp_path: Path, target: str, is_x86: bool
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$1" in -dumpmachine) echo {target};; *) echo one of ours 1.0;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = build.cpp_compiler()
    assert (found.machine, found.version) == (target.split("-")[0], "one of ours 1.0")
    steps = list(build._cpu_steps(found.machine))
    assert any("-mavx2" in flags for _, _, flags in steps) == is_x86
    assert all(f"-DRWKV_HAS_X86_TARGETS={int(is_x86)}" in flags for _, _, flags in steps)
    assert any("-DRWKV_TARGET=portable" in flags for _, _, flags in steps)


def test_unknown_targets_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        build.main(["rocm"])
    assert "unknown target rocm; targets: cpu, cuda, host" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.system
def test_builds_at_the_same_time_take_turns(cpu_library: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rwkv_cluster.kernels.build", "cpu", "--output", str(tmp_path)]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for made in builds:
        output, _ = made.communicate(timeout=300)
        assert made.returncode == 0
        assert output.startswith(f"{tmp_path / 'libwkv_cpu.so'}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libwkv_cpu.so", "wkv_cpu.json"]
    assert (tmp_path / "libwkv_cpu.so").read_bytes() == cpu_library.read_bytes()
