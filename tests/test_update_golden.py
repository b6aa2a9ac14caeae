"""`pytest --update-golden` writes golden files that differ anew, and nothing else does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden_files import FLAG

pytestmark = pytest.mark.system

TESTS = Path(__file__).parent
SCRIPT, LOSSES = "launch/sbatch.sh", "losses.json"
EXAMPLE = f"""
import json
from pathlib import Path

ORIGINAL = Path({str(TESTS / "golden")!r})

def test_script(golden):
    golden.check_text({SCRIPT!r}, (ORIGINAL / {SCRIPT!r}).read_text())

def test_losses(golden):
    curve = json.loads((ORIGINAL / {LOSSES!r}).read_text())["x070"]
    golden.check_numbers({LOSSES!r}, "x070", curve, rel=1e-5)
"""


def _run(copy: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "test_example.py"]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=100).stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of tests with a word changed in a script and a loss in a curve."""
    shutil.copytree(TESTS / "golden", tmp_path / "golden")
    for source in (TESTS / "conftest.py", TESTS / "support" / "golden_files.py"):
        shutil.copy2(source, tmp_path)
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    script, losses = (tmp_path / "golden" / name for name in (SCRIPT, LOSSES))
    script.write_text(script.read_text().replace("#SBATCH", "#BATCH", 1))
    curves = json.loads(losses.read_text())
    curves["x070"][50] += 0.01
    losses.write_text(json.dumps(curves, indent=1) + "\n")
    return tmp_path


@pytest.mark.slow
def test_a_changed_golden_file_fails_and_is_rewritten_to_equal(copy: Path) -> None:
    assert "2 failed" in _run(copy)
    for name in (SCRIPT, LOSSES):
        assert (copy / "golden" / name).read_bytes() != (TESTS / "golden" / name).read_bytes()
    assert "2 passed" in _run(copy, FLAG)
    for name in (SCRIPT, LOSSES):
        assert (copy / "golden" / name).read_bytes() == (TESTS / "golden" / name).read_bytes()
    assert "2 passed" in _run(copy)
