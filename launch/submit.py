"""Carry out a plan: `<work_dir>/launch/<time>/` is made, readable by its owner alone, and its launcher starts it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.launch_folder import MEMBERS
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.launch.launchers.launcher import Launched, Plan
from rwkv_cluster.runtime.own_file import reason, require_folder
from rwkv_cluster.workdir import WorkDir


def launch_folder(work_dir: str, now: float) -> Path:
    """Directory of a launch at `now`, a time in seconds since the epoch."""
    return WorkDir(work_dir).launches / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))


def submit(plan: Plan) -> Launched:
    """Write the launch directory and start the job.

    Returns at once from a scheduler. A job on this machine is followed to its end. Raises LaunchError.
    """
    for run in (plan, *plan.members):
        WorkDir(run.config.work_dir).require_free()
    launcher = LAUNCHERS[plan.config.launch.target]
    launcher.require()
    folder = _write(plan)
    members = [_write(member) for member in plan.members]
    if members:
        _private(folder / MEMBERS, "".join(f"{member}\n" for member in members).encode())
    return launcher.submit(plan, folder, members)


def _write(plan: Plan) -> Path:
    """Make the launch directory with the plan's files. Returns its path."""
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
    except OSError as error:
        raise LaunchError(f"{folder} cannot be made: {reason(error)}") from error
    return folder


def _private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as handle:
        handle.write(content)
