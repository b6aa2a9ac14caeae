"""The wheel: complete, importable from anywhere, and nothing but `rwkv_cluster` at the top level."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import rwkv_cluster

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent
FOLDERS = {"rwkv_cluster": "rwkv_cluster", "kernels": "rwkv_cluster/kernels", "launch": "rwkv_cluster/launch",
           "configs": "rwkv_cluster/configs"}  # fmt: skip
SOURCES = (".py", ".yaml", ".css", ".c", ".h", ".hpp", ".cpp", ".cu", ".cuh")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "lib")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, "wheel", *options, str(folder / "tree")], check=True, cwd=folder)
    return next(folder.glob("rwkv_cluster-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed") / "target"
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(target)]
    subprocess.run([*PIP, "install", *options, str(wheel)], check=True)
    return target


def python(installed: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in another directory, where only the installed package can be found."""
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", **environment},
    )


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        headers = Parser().parsestr(archive.read(metadata).decode())
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES or path.name == "py.typed"
    }
    assert {"rwkv_cluster/configs/quickstart.yaml", "rwkv_cluster/kernels/csrc/cpu/wkv.cpp"} <= expected
    built = {name for name in names if name.endswith(".so") or "/kernels/lib/" in name}
    assert names - built == expected
    matcher = built & {"rwkv_cluster/tokenizer/_trie_matcher.so"}
    assert len(matcher) == (1 if shutil.which(os.environ.get("CC", "cc")) else 0)
    kernels = {f"rwkv_cluster/kernels/lib/{name}" for name in ("libwkv_cpu.so", "wkv_cpu.json")}
    assert built - matcher == (kernels if shutil.which(os.environ.get("CXX", "c++")) else set())
    assert (headers["Name"], headers["Version"]) == ("rwkv-cluster", rwkv_cluster.__version__)


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"rwkv_cluster-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)


def test_it_imports_from_another_directory(installed: Path) -> None:
    script = (
        "import importlib.util, sys, rwkv_cluster\n"
        "from rwkv_cluster.tokenizer.trie_matcher import library\n"
        "import rwkv_cluster.kernels.ops, rwkv_cluster.launch.command\n"
        "print(rwkv_cluster.__file__, rwkv_cluster.kernels.ops.__file__, library() is not None)\n"
        "print([name for name in ('kernels', 'launch', 'configs', 'tests') if importlib.util.find_spec(name)])\n"
    )
    run = python(installed, sys.executable, "-c", script)
    assert run.stderr == ""
    where, others = run.stdout.splitlines()
    package, kernels, has_library = where.split()
    assert package == str(installed / "rwkv_cluster/__init__.py")
    assert kernels == str(installed / "rwkv_cluster/kernels/ops.py")
    assert has_library == str(bool(list(installed.glob("rwkv_cluster/tokenizer/_trie_matcher*.so"))))
    assert others == "[]"


def test_the_command_helps_without_torch_and_finds_its_recipes(installed: Path) -> None:
    command = str(installed / "bin" / "rwkv-cluster")
    run = python(installed, command, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert run.returncode == 0
    assert run.stdout.startswith("usage: rwkv-cluster")
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "rwkv_cluster.cli" in imported
    assert not imported & {"torch", "numpy", "pydantic", "pytorch_lightning"}
    run = python(installed, command, "config", "quickstart.yaml")
    assert run.returncode == 0
    assert "model_type: x070" in run.stdout
