"""Carry out a plan: `<work_dir>/launch/<time>/` is made, readable by its owner alone, and its commands run in it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from rwkv_cluster.config.launch import Target
from rwkv_cluster.errors import Interrupted, LaunchError
from rwkv_cluster.launch.logs import Tail
from rwkv_cluster.launch.plan import PREPARE_JOB, Plan
from rwkv_cluster.runtime.exit_report import rank_log
from rwkv_cluster.runtime.heartbeat import start_tick, this_process
from rwkv_cluster.runtime.interrupt import Listener, listening
from rwkv_cluster.runtime.own_file import WrongKindError, read_own, reason, require_folder
from rwkv_cluster.runtime.terminal.text_safety import visible
from rwkv_cluster.workdir import WorkDir, atomic_write

JOBS, PROCESS, EXIT, MEMBERS, SUBMISSION = "jobs", "process.json", "exit", "members", "submission.pkl"
COMMAND, CONTAINER = "command.json", "container.id"
POLL_S = 0.1


@dataclass(frozen=True)
class Launched:
    """A launch under way.

    jobs: numbers that Slurm gave, the training job last; code: of one that ended; members: folders of a sweep's runs.
    """

    folder: Path
    jobs: tuple[str, ...] = ()
    code: int | None = None
    members: tuple[Path, ...] = ()


def launch_folder(work_dir: str, now: float) -> Path:
    """Where a launch of this moment would be."""
    return WorkDir(work_dir).root / "launch" / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))


def submit(plan: Plan) -> Launched:
    """Write the launch directory and start the job.

    Returns at once from a scheduler. A job on this machine is followed to its end: its first rank's log goes to
    stdout, what its launchers say to stderr, and signals reach the ranks. Raises LaunchError.
    """
    for one in (plan, *plan.members):
        WorkDir(one.config.work_dir).require_free()
    if plan.config.launch.target == "slurm" and find_spec("submitit") is None:
        raise LaunchError(
            "launch.target is slurm, but submitit is not installed. `pip install submitit`, or use sbatch"
        )
    folder = _write(plan)
    members = [_write(member) for member in plan.members]
    if members:
        _private(folder / MEMBERS, "".join(f"{member}\n" for member in members).encode())
    if not plan.config.launch.is_batch:
        return Launched(folder, code=_run_here(plan, folder))
    numbers = _submit_jobs(plan, folder)
    _record_jobs(folder, numbers)
    for index, member in enumerate(members):
        _record_jobs(member, [f"{number}_{index}" for number in numbers])
    return Launched(folder, tuple(numbers), members=tuple(members))


def _write(plan: Plan) -> Path:
    folder = launch_folder(plan.config.work_dir, time.time())
    require_folder(folder.parent, may_link=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.chmod(0o700)
        while True:
            try:
                folder.mkdir(mode=0o700)
                break
            except FileExistsError:  # two launches in one second
                folder = folder.with_name(f"{folder.name}-{os.getpid()}")
        for name, text in plan.files.items():
            _private(folder / name, text.encode())
        if plan.config.launch.target == "slurm" and not plan.members:
            _write_submission(plan, folder / SUBMISSION)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be made: {reason(error)}") from error
    return folder


def _private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as handle:
        handle.write(content)


def _write_submission(plan: Plan, path: Path) -> None:
    """For submitit, which is imported where it is used: no other target needs it."""
    from rwkv_cluster.launch.submitit_task import submission

    assert plan.node_command is not None
    launch = plan.config.launch
    _private(path, b"")
    submission(plan.node_command.argv, launch.max_requeues if launch.requeue else None).dump(path)


def _record_jobs(folder: Path, numbers: Sequence[str]) -> None:
    atomic_write(folder / JOBS, "".join(f"{number}\n" for number in numbers).encode())


def _submit_jobs(plan: Plan, folder: Path) -> list[str]:
    """Numbers of the submitted jobs; those already in the queue are taken back when one is refused."""
    numbers: list[str] = []
    for command in plan.commands:
        argv = [argument.replace(PREPARE_JOB, numbers[-1] if numbers else "") for argument in command.argv]
        try:
            numbers.append(_sbatch(argv, folder))
        except (LaunchError, Interrupted):
            if numbers:
                subprocess.run(["scancel", *numbers], check=False, capture_output=True)
            raise
    return numbers


def _sbatch(argv: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise LaunchError(
            f"{argv[0]} is not here. Launch on a machine of the cluster, or with another target"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} gave no answer for 120 s. Look at `sinfo` and `squeue --me`") from None
    found = re.match(r"\d+", done.stdout)
    if done.returncode or not found:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise LaunchError(f"Slurm refuses {folder / argv[-1]}: {said}")
    return found[0]


def _run_here(plan: Plan, folder: Path) -> int:
    """Exit code of the job. Raises Interrupted when it was to end at once, after it has."""
    (command,) = plan.commands
    with open(folder / "job.log", "ab") as output, listening() as listener:
        listener.defer("asking the run for a checkpoint and its end")
        try:
            process = subprocess.Popen(
                command.argv,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"{command.argv[0]} cannot be started: {error.strerror}") from None
        try:
            record = {"launcher": this_process(), **this_process()}
            record |= {"pid": process.pid, "started": start_tick(process.pid)}
            atomic_write(folder / PROCESS, json.dumps(record).encode())
            code = _follow(process, folder, listener)
        except Interrupted:
            end_here(folder, process.pid)
            atomic_write(folder / EXIT, f"{_exit_code(process.wait())}\n".encode())
            raise
        listener.obey()
    atomic_write(folder / EXIT, f"{code}\n".encode())
    return code


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _follow(process: subprocess.Popen[bytes], folder: Path, listener: Listener) -> int:
    """Exit code of the job, while its logs are shown and what this process receives is passed on."""
    streams = ((Tail(rank_log(folder, 0)), sys.stdout), (Tail(folder / "job.log"), sys.stderr))
    passed = 0
    while True:
        ended = process.poll() is not None
        for tail, stream in streams:
            stream.write(visible(tail.read()))
            stream.flush()
        if ended:
            return _exit_code(process.returncode)
        if listener.count > passed:
            passed = listener.count
            stop_here(folder, process.pid)
        time.sleep(POLL_S)


def stop_here(folder: Path, pid: int) -> None:
    """Ask the agent of a job on this machine for a checkpoint and the end."""
    if not _tell_container(folder, "--signal=USR1") and start_tick(pid) is not None:
        os.kill(pid, signal.SIGUSR1)


def end_here(folder: Path, pid: int | None) -> None:
    """Kill a job on this machine. pid: of its first process, None where that is gone."""
    _tell_container(folder)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # a session of its own; ranks elsewhere end with their parent


def target_of(folder: Path) -> str:
    """What a launch was started on. Raises LaunchError where its command.json does not say."""
    try:
        found = json.loads(read_own(folder / COMMAND))["target"]
    except WrongKindError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LaunchError(f"{folder / COMMAND} cannot be read: it is not what a launch has left there") from error
    if found not in get_args(Target):
        raise LaunchError(f"{folder / COMMAND} names {str(found)[:80]!r}, which is no launch.target")
    return str(found)


def _tell_container(folder: Path, *options: str) -> bool:
    """Send a signal, SIGKILL if none is named, to the job's container. False where there is none.

    Raises LaunchError where the launch's files name no container.
    """
    if not (folder / CONTAINER).exists():
        return False
    runtime, number = target_of(folder), read_own(folder / CONTAINER).decode(errors="replace").strip()
    if runtime not in ("docker", "podman") or not re.fullmatch(r"[0-9a-f]{8,64}", number):
        raise LaunchError(f"{folder / CONTAINER} holds {number[:80]!r}, expected the id of a container")
    subprocess.run((runtime, "kill", *options, number), check=False, capture_output=True, timeout=60)
    return True
