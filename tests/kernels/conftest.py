"""Libraries that the kernel tests share, built once a session."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build, loader


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels as they run on a CPU."""
    path: Path = build.build("host", tmp_path_factory.mktemp("host"))
    return loader.open_library(path)
