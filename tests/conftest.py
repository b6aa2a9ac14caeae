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


LONGEST = ("test_image", "test_slurm", "test_zero", "test_slurm_faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, so that workers that take a file each end together."""
    places = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, action="store_true", help="write the files in tests/golden anew where they differ")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """tests/golden."""
    return Golden(Path(__file__).parent / "golden", update=request.config.getoption(FLAG))
