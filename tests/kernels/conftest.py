"""Libraries that the kernel tests share, built once a session."""

from __future__ import annotations

import ctypes
import shutil
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
    """The installed CPU kernels, alone with their manifest in a folder."""
    installed = loader.cpu()
    assert isinstance(installed, loader.Library), "install the package again, or build: its sources have changed"
    folder = tmp_path_factory.mktemp("cpu")
    for name in (installed.path.name, "wkv_cpu.json"):
        shutil.copy2(installed.path.parent / name, folder)
    return folder / installed.path.name
