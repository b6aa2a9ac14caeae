"""What all tests share: `--update-golden`."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_files import FLAG, Golden


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, action="store_true", help="write the files in tests/golden anew where they differ")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """tests/golden."""
    return Golden(Path(__file__).parent / "golden", update=request.config.getoption(FLAG))
