"""All tests: `--update-golden`, signals as a terminal's processes have them, and Lightning without what it draws in."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from golden_files import FLAG, Golden

from rwkv_cluster.commands.loading import importing_torch

with importing_torch():  # as the command line does: transformers alone would take seconds of every worker
    import pytorch_lightning  # noqa: F401

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has left out, for this process and those that it starts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, action="store_true", help="write the files in tests/golden anew where they differ")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """tests/golden."""
    return Golden(Path(__file__).parent / "golden", update=request.config.getoption(FLAG))
