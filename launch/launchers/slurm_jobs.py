"""What Slurm knows of a launch's jobs."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.launch_folder import JOBS
from rwkv_cluster.runtime.own_file import read_own

END_STATES = (
    *("ended", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
)


@dataclass(frozen=True)
class _Job:
    """A job, or a task of an array, in Slurm's words. array_task: its number, N/A for a job."""

    array_task: str
    state: str
    restarts: str
    exit_code: str
    run_time: str
    nodes: str
    reason: str


def run_slurm(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs to its end. Raises LaunchError where it is not here or gives no answer."""
    # SQUEUE_PARTITION and the like choose jobs as an option does, and one that is left out would look forgotten.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]} is not here", remedy="Use a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} gave no answer for 60 s") from None


def job_numbers(folder: Path) -> list[str]:
    """Numbers of a launch's jobs, the newest last. Raises LaunchError where there are none."""
    try:
        words = read_own(folder / JOBS).decode(errors="replace").split()
    except FileNotFoundError:
        raise LaunchError(f"{folder}: no job was submitted from here") from None
    numbers = [word.partition(";")[0] for word in words]  # of a federation: 123;cluster
    wrong = [number for number in numbers if not re.fullmatch(r"\d+(_\d+)?", number)]
    if wrong or not numbers:
        raise LaunchError(f"{folder / JOBS} holds {', '.join(wrong)[:80]!r}, expected numbers of Slurm's jobs")
    return numbers


def job_state(number: str) -> tuple[str, str]:
    """State and details of a job, from squeue, else from sacct.

    squeue drops a job soon after its end, and some sites have no sacct. Raises LaunchError where squeue fails.
    """
    tasks = _queued(number)
    if len(tasks) > 1 or (tasks and tasks[0].array_task.isdigit() and "_" not in number):
        return _array_state(number, tasks)
    if tasks:
        (job,) = tasks
        how = f"Reason {job.reason}, RunTime {job.run_time}, NodeList {job.nodes}, Restarts {job.restarts}"
        return job.state, f"job {number}, {how}, ExitCode {_exit_code(job.exit_code)}"
    with suppress(LaunchError):
        lines = run_slurm("sacct", "-n", "-X", "-P", "-o", "State,ExitCode", "-j", number).stdout.splitlines()
        if lines and "|" in lines[-1]:
            state, code = lines[-1].split("|")[:2]
            return state.split()[0], f"job {number}, ExitCode {code}"
    return "ended", f"job {number}, which Slurm no longer knows"


def _queued(number: str) -> list[_Job]:
    """What the controller knows of a job, task by task; empty where it knows nothing.

    Named fields with a mark after each: names, comments and directories, which a user writes, have no part in it.
    The last one may be anything. Raises LaunchError where the controller does not answer: then a job is not over.
    """
    fields = ("ArrayTaskID", "State", "RestartCnt", "exit_code", "TimeUsed", "NodeList", "Reason")
    columns = ",".join(f"{name}:|" for name in fields)
    done = run_slurm("squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", f"--Format={columns}")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(f"squeue failed: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    rows = [line.split("|", len(fields) - 1) for line in done.stdout.splitlines()]
    return [_Job(*(value.rstrip("|") for value in row)) for row in rows if len(row) == len(fields)]


def _exit_code(status: str) -> str:
    """`code:signal`, as Slurm's other programs write it, from the wait status that squeue has."""
    return f"{int(status) >> 8}:{int(status) & 127}" if status.isdigit() else status


def _array_state(number: str, tasks: list[_Job]) -> tuple[str, str]:
    """State of the array: of a task that has not ended, else of one that did not complete."""
    states = [task.state for task in tasks]
    rows = sorted((int(task.array_task) if task.array_task.isdigit() else 0, task.state) for task in tasks)
    detail = f"job {number}, " + ", ".join(f"run {run} {state}" for run, state in rows)
    under_way = [state for state in states if state not in END_STATES]
    failed = [state for state in states if state != "COMPLETED"]
    return ((["RUNNING"] if "RUNNING" in under_way else under_way) or failed or states)[0], detail
