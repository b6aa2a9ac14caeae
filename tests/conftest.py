"""All tests: `--update-golden`, signals as a terminal's processes have them, and Lightning without what it draws in."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from golden_files import FLAG, Golden

from rwkv_cluster.commands.loading import importing_torch

# For this process and those that it starts: nohup leaves the one out, and a shell the other behind "&".
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, action="store_true", help="write the files in tests/golden anew where they differ")


def pytest_configure(config: pytest.Config) -> None:
    """Import Lightning as the command line does, for transformers alone would take seconds, where tests are run."""
    if not config.getoption("numprocesses", None):  # the process that hands tests to workers runs none
        with importing_torch():
            import pytorch_lightning  # noqa: F401


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """tests/golden."""
    return Golden(Path(__file__).parent / "golden", update=request.config.getoption(FLAG))
