"""What has become of a launch: its state, its logs and its end, from the work directory alone, for every target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.config.launch import BATCH_TARGETS
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.logs import Tail
from rwkv_cluster.launch.submit import EXIT, JOBS, MEMBERS, PROCESS, end_here, stop_here, target_of
from rwkv_cluster.runtime.exit_report import rank_log
from rwkv_cluster.runtime.heartbeat import machine, start_tick
from rwkv_cluster.runtime.own_file import open_own, owner, read_own, require_folder

POLL_S = 0.2
END_S = 60.0  # for a job to end that Slurm is told to end
ENDED = ("ended", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


@dataclass(frozen=True)
class Status:
    """state: Slurm's word; running, ended or unknown for processes of a machine. detail: what else is known."""

    folder: Path
    target: str
    state: str
    detail: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def newest(work_dir: Path) -> Path:
    """The last launch of a work directory. Raises LaunchError where there is none, or where it is not to be seen."""
    require_folder(work_dir / "launch", may_link=False)
    try:
        os.listdir(work_dir / "launch")
    except PermissionError as error:
        raise LaunchError(
            f"{error.filename} belongs to {owner(error.filename)}, and only they may look into it. Ask them, or "
            "become that user"
        ) from error
    except OSError:  # not there
        pass
    found = sorted(path.parent for path in work_dir.glob("launch/*/command.json"))
    if not found:
        raise LaunchError(
            f"{work_dir} has no launch. Name the work directory of a run that rwkv-cluster launch started"
        )
    return found[-1]


def status(folder: Path) -> Status:
    """What a launch is doing now."""
    target = target_of(folder)
    if target in BATCH_TARGETS:
        return Status(folder, target, *_job_state(_jobs(folder)[-1]))
    return Status(folder, target, *_process_state(folder))


def follow(folder: Path, rank: int | None) -> Iterator[str]:
    """Text of the launch's logs, or of one rank's, as it comes, until the launch has ended."""
    tails: dict[Path, Tail] = {}
    while True:
        ended = status(folder).has_ended
        yield from _new_text(folder, rank, tails)
        if ended:
            return
        time.sleep(POLL_S)


def logs(folder: Path, rank: int | None) -> str:
    """The logs so far. Raises LaunchError for a rank that has none."""
    if rank is not None and not rank_log(folder, rank).exists():
        raise LaunchError(f"{rank_log(folder, rank)} is not there: rank {rank} has not started, or does not exist")
    return "".join(_new_text(folder, rank, {}))


def cancel(folder: Path, *, grace_s: float) -> Status:
    """Ask for a checkpoint and the end, and end what still runs after `grace_s`. Raises LaunchError."""
    found = status(folder)
    if found.has_ended:
        return found
    for one in (folder, *_members(folder)):
        os.close(open_own(one / "cancelled", os.O_WRONLY | os.O_CREAT, 0o600))
    batch = found.target in BATCH_TARGETS
    if not batch and found.state == "unknown":
        raise LaunchError(f"{folder}: {found.detail}. Cancel it there")
    if grace_s > 0:
        _ask_batch(folder, found) if batch else stop_here(folder, _process(folder)["pid"])
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and not status(folder).has_ended:
            time.sleep(POLL_S)
    if not status(folder).has_ended:
        _end_batch(folder) if batch else _end_here(folder)
    found = status(folder)
    if not found.has_ended:
        raise LaunchError(f"{folder}: it is {found.state} still, {found.detail}. Run cancel again")
    return found


def _new_text(folder: Path, rank: int | None, tails: dict[Path, Tail]) -> Iterator[str]:
    folders = [folder, *_members(folder)]
    if rank is None:
        wanted = [path for one in folders for path in sorted({*one.glob("*.log")} - {*one.glob("rank-*")})]
    else:
        wanted = []
    wanted += [rank_log(one, rank or 0) for one in folders]
    for path in wanted:
        if text := tails.setdefault(path, Tail(path)).read():
            yield text


def _members(folder: Path) -> list[Path]:
    """Launch directories of a sweep's runs; empty for one run."""
    with suppress(FileNotFoundError):
        return [Path(line) for line in read_own(folder / MEMBERS).decode().splitlines()]
    return []


def _jobs(folder: Path) -> list[str]:
    try:
        found = read_own(folder / JOBS).decode(errors="replace").split()
    except FileNotFoundError:
        raise LaunchError(f"{folder}: no job was submitted from here") from None
    found = [job.partition(";")[0] for job in found]  # of a federation: 123;cluster
    wrong = [job for job in found if not re.fullmatch(r"\d+(_\d+)?", job)]
    if wrong or not found:
        raise LaunchError(f"{folder / JOBS} holds {', '.join(wrong)[:80]!r}, expected numbers of Slurm's jobs")
    return found


def _slurm(*argv: str) -> subprocess.CompletedProcess[str]:
    """One of Slurm's programs, run to its end. Raises LaunchError where it is not here or gives no answer."""
    # SQUEUE_PARTITION and the like choose jobs as an option does, and one that is left out would look forgotten.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]} is not here. Use a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} gave no answer for 60 s") from None


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


def _queued(job: str) -> list[_Job]:
    """What the controller knows of a job, task by task; empty where it knows nothing.

    Named fields with a mark after each: names, comments and directories, which a user writes, have no part in it.
    The last one may be anything. Raises LaunchError where the controller does not answer: then a job is not over.
    """
    fields = ("ArrayTaskID", "State", "RestartCnt", "exit_code", "TimeUsed", "NodeList", "Reason")
    wanted = ",".join(f"{name}:|" for name in fields)
    done = _slurm("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", f"--Format={wanted}")
    if done.returncode and "Invalid job id" not in done.stderr:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"squeue failed: {said}")
    rows = [line.split("|", len(fields) - 1) for line in done.stdout.splitlines()]
    return [_Job(*(value.rstrip("|") for value in row)) for row in rows if len(row) == len(fields)]


def _job_state(job: str) -> tuple[str, str]:
    """By the controller, which forgets a job soon after its end; then by accounting, which not every site has."""
    found = _queued(job)
    if len(found) > 1 or (found and found[0].array_task.isdigit() and "_" not in job):
        return _array_state(job, found)
    if found:
        (one,) = found
        how = f"Reason {one.reason}, RunTime {one.run_time}, NodeList {one.nodes}, Restarts {one.restarts}"
        return one.state, f"job {job}, {how}, ExitCode {_exit_code(one.exit_code)}"
    with suppress(LaunchError):
        lines = _slurm("sacct", "-n", "-X", "-P", "-o", "State,ExitCode", "-j", job).stdout.splitlines()
        if lines and "|" in lines[-1]:
            state, code = lines[-1].split("|")[:2]
            return state.split()[0], f"job {job}, ExitCode {code}"
    return "ended", f"job {job}, which Slurm no longer knows"


def _exit_code(status: str) -> str:
    """`code:signal`, as Slurm's other programs write it, from the wait status that squeue has."""
    return f"{int(status) >> 8}:{int(status) & 127}" if status.isdigit() else status


def _array_state(job: str, tasks: list[_Job]) -> tuple[str, str]:
    """State of the array: of a task that has not ended, else of one that did not complete."""
    states = [task.state for task in tasks]
    rows = sorted((int(task.array_task) if task.array_task.isdigit() else 0, task.state) for task in tasks)
    detail = f"job {job}, " + ", ".join(f"run {number} {state}" for number, state in rows)
    under_way = [state for state in states if state not in ENDED]
    failed = [state for state in states if state != "COMPLETED"]
    return ((["RUNNING"] if "RUNNING" in under_way else under_way) or failed or states)[0], detail


def _process(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_own(folder / PROCESS))
        pids = (record["pid"], record["launcher"]["pid"])
        facts = (record["host"], record["machine"], record["started"], record["launcher"]["started"])
    except FileNotFoundError:
        raise LaunchError(f"{folder}: no process was started from here") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LaunchError(f"{folder / PROCESS} cannot be read: it is not what a launch has left there") from error
    if not all(isinstance(pid, int) and pid > 1 for pid in pids) or not all(isinstance(f, str | None) for f in facts):
        raise LaunchError(f"{folder / PROCESS} does not say which process was started")
    return dict(record)


def _process_state(folder: Path) -> tuple[str, str]:
    if (folder / EXIT).exists():
        return "ended", f"exit code {read_own(folder / EXIT).decode(errors='replace').strip()[:20]}"
    record = _process(folder)
    if record["machine"] != machine():
        return "unknown", f"it was started on {record['host']}, which is another machine"
    for process in (record, record["launcher"]):  # which has yet to write the exit code
        if start_tick(process["pid"]) == process["started"] is not None:
            return "running", f"process {record['pid']} on {record['host']}"
    return "ended", "exit code unknown: the launching process was killed"


def _ask_batch(folder: Path, found: Status) -> None:
    for job in _jobs(folder):
        _slurm("scancel", *(["--signal=USR2"] if found.state == "RUNNING" else []), job)


def _end_batch(folder: Path) -> None:
    _slurm("scancel", *_jobs(folder))
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline and not status(folder).has_ended:
        time.sleep(POLL_S)


def _end_here(folder: Path) -> None:
    record = _process(folder)
    end_here(folder, record["pid"] if start_tick(record["pid"]) == record["started"] else None)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not status(folder).has_ended:
        time.sleep(POLL_S)
