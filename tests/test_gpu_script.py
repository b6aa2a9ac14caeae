"""tests/gpu.sh: every stage is skipped where there is no GPU; one that fails or hangs costs the others nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STAGES = ["facts", "kernels", "sanitizer", "training", "wkv", "step"]

# In place of Python on a machine with a GPU: one stage fails, one never ends, the others succeed.
STAND_IN = """#!/bin/bash
case "$*" in
    -c*) echo True ;;
    *--collect*) exec {python} "$@" ;;
    *gpu_facts*) echo '{{"copy_gb_per_s": 3000.0}}' > "$2" ;;
    *sanitizer*tests/kernels*) [ "$*" = "${{*/not sanitizer/}}" ] && sleep 600; echo "3 passed" ;;
    *tests/train*) echo "1 failed"; exit 1 ;;
    *) echo "fine" ;;
esac
"""


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tests/gpu.sh")],
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.system
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run tests/gpu.sh itself")
def test_without_a_gpu_every_stage_is_skipped(tmp_path: Path) -> None:
    done = run(tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:-1] == [f"{stage}: skipped: no GPU" for stage in STAGES]
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert results["torch"] == torch.__version__
    assert {stage["outcome"] for stage in results["stages"].values()} == {"skipped"}


@pytest.mark.system
def test_a_stage_that_fails_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    done = run(tmp_path / "results", PYTHON=str(stand_in), BUDGET="20")
    assert done.returncode == 1
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert {name: stage["outcome"] for name, stage in results["stages"].items()} == dict.fromkeys(STAGES, "ok") | {
        "sanitizer": "stopped",
        "training": "failed",
    }
    assert results["facts"] == {"copy_gb_per_s": 3000.0}
    assert "    1 failed\n" in (tmp_path / "results/summary.txt").read_text()


def test_an_unknown_stage_is_refused_before_any_runs(tmp_path: Path) -> None:
    done = run(tmp_path / "results", STAGES="facts kernel")
    assert done.returncode == 2
    assert "no stage 'kernel'" in done.stderr
    assert not (tmp_path / "results/summary.txt").exists()
