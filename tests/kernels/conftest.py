"""Libraries that the kernel tests share, built once a session."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build, loader


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels as they run on a CPU."""
    path: Path = build.build("host", tmp_path_factory.mktemp("host"))
    return loader.open_library(path)


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU kernels as the command builds them, alone with their manifest in a folder."""
    folder = tmp_path_factory.mktemp("cpu")
    command = [sys.executable, "-m", "rwkv_cluster.kernels.build", "cpu", "--output", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    path = folder / "libwkv_cpu.so"
    assert run.stdout.startswith(f"{path}: ")
    return path
