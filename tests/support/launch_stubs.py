"""Programs of a cluster that do nothing but write down how they were called."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.launch.launchers.launcher import Plan

PROGRAMS = (
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
    "sleep",
    "docker",
    "podman",
    "apptainer",
    "python-stub",
    "python3",
)
_STUB = """\
#!/bin/sh
printf '%s\\0' "$(basename "$0")" "$@" > "$RECORDS/argv.$$.$(basename "$0")"
env -0 > "$RECORDS/env.$$.$(basename "$0")"
case $(basename "$0") in
    scontrol) echo node1 ;;
    squeue) echo RUNNING ;;
    srun) exit "${SRUN_CODE:-0}" ;;
esac
"""


@dataclass(frozen=True)
class Call:
    argv: list[str]
    environment: dict[str, str]


def install(folder: Path) -> Path:
    """A folder for PATH with the stubs."""
    folder.mkdir()
    for name in PROGRAMS:
        path = folder / name
        path.write_text(_STUB)
        path.chmod(0o755)
    return folder


def run_script(
    plan: Plan, name: str, folder: Path, stubs: Path, *, step_code: int = 0, expected_code: int = 0
) -> list[Call]:
    """Write a plan's files as submitting does, run one of its scripts with bash, and tell who was called.

    step_code: exit code of each srun; expected_code: that the script must end with.
    """
    launch, records = folder / "launch", folder / "records"
    launch.mkdir()
    records.mkdir()
    for file, text in plan.files.items():
        (launch / file).write_text(text)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "RECORDS": str(records), "HOME": "/home/someone"}
    environment |= {"SRUN_CODE": str(step_code), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    done = subprocess.run(["bash", name], cwd=launch, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == expected_code, done.stderr
    return [_call(records, path) for path in sorted(records.glob("argv.*"), key=os.path.getmtime)]


def _call(records: Path, path: Path) -> Call:
    argv = path.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    variables = (records / path.name.replace("argv", "env", 1)).read_bytes().decode(errors="surrogateescape")
    return Call(argv, dict(entry.split("=", 1) for entry in variables.split("\0") if "=" in entry))
