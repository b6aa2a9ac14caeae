"""What has become of a launch: its state, its logs and its end, from the work directory alone, for every target."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.heartbeat import machine, start_tick
from rwkv_cluster.launch.logs import Tail
from rwkv_cluster.launch.submit import EXIT, JOBS, MEMBERS, PROCESS, stop_here
from rwkv_cluster.launch_config import BATCH_TARGETS
from rwkv_cluster.launched import rank_log

POLL_S = 0.2
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
    """The last launch of a work directory. Raises LaunchError where there is none."""
    found = sorted(path.parent for path in work_dir.glob("launch/*/command.json"))
    if not found:
        raise LaunchError(
            f"{work_dir} has no launch. Name the work directory of a run that rwkv-cluster launch started"
        )
    return found[-1]


def status(folder: Path) -> Status:
    """What a launch is doing now."""
    target = str(json.loads((folder / "command.json").read_text())["target"])
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
        (one / "cancelled").touch(mode=0o600)
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
    return status(folder)


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
        return [Path(line) for line in (folder / MEMBERS).read_text().splitlines()]
    return []


def _jobs(folder: Path) -> list[str]:
    try:
        return (folder / JOBS).read_text().split()
    except FileNotFoundError:
        raise LaunchError(f"{folder}: no job was submitted from here") from None


def _slurm(*argv: str) -> str:
    """Output of one of Slurm's programs; empty where it fails, as for a job that it has forgotten."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]} is not here. Use a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} gave no answer for 60 s") from None


def _job_state(job: str) -> tuple[str, str]:
    """By the controller, which forgets a job soon after its end; then by accounting, which not every site has."""
    text = _slurm("scontrol", "show", "job", "-o", job)
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    found = [facts for facts in found if "JobState" in facts]
    if len(found) > 1 or (found and "ArrayTaskId" in found[0] and "_" not in job):
        return _array_state(job, found)
    if found:
        (facts,) = found
        words = ("Reason", "RunTime", "NodeList", "Restarts", "ExitCode")
        return facts["JobState"], f"job {job}, " + ", ".join(f"{word} {facts.get(word)}" for word in words)
    with suppress(LaunchError):
        lines = _slurm("sacct", "-n", "-X", "-P", "-o", "State,ExitCode", "-j", job).splitlines()
        if lines and "|" in lines[-1]:
            state, code = lines[-1].split("|")[:2]
            return state.split()[0], f"job {job}, ExitCode {code}"
    return "ended", f"job {job}, which Slurm no longer knows"


def _array_state(job: str, tasks: list[dict[str, str]]) -> tuple[str, str]:
    """State of the array: of a task that has not ended, else of one that did not complete."""
    states = [facts["JobState"] for facts in tasks]
    rows = sorted((facts["ArrayTaskId"], facts["JobState"]) for facts in tasks)
    detail = f"job {job}, " + ", ".join(f"run {number} {state}" for number, state in rows)
    under_way = [state for state in states if state not in ENDED]
    failed = [state for state in states if state != "COMPLETED"]
    return ((["RUNNING"] if "RUNNING" in under_way else under_way) or failed or states)[0], detail


def _process(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / PROCESS).read_text()))
    except FileNotFoundError:
        raise LaunchError(f"{folder}: no process was started from here") from None


def _process_state(folder: Path) -> tuple[str, str]:
    if (folder / EXIT).exists():
        return "ended", f"exit code {(folder / EXIT).read_text().strip()}"
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
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not status(folder).has_ended:
        time.sleep(POLL_S)


def _end_here(folder: Path) -> None:
    record = _process(folder)
    container = folder / "container.id"
    if container.exists():
        runtime = json.loads((folder / "command.json").read_text())["target"]
        subprocess.run([runtime, "kill", container.read_text().strip()], check=False, capture_output=True, timeout=60)
    if start_tick(record["pid"]) == record["started"]:
        with suppress(ProcessLookupError):
            os.killpg(record["pid"], signal.SIGKILL)  # a session of its own; ranks elsewhere end with their parent
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not status(folder).has_ended:
        time.sleep(POLL_S)
