"""What has become of a launch: its state, its logs and its end, from the work directory alone, for every target."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.launch_folder import COMMAND, MEMBERS
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.runtime.own_file import WrongKindError, open_own, owner, read_own, require_folder
from rwkv_cluster.workdir import WorkDir


@dataclass(frozen=True)
class Status:
    """state: a word of Slurm or Kubernetes; running, ended or unknown for processes of a machine. detail: what else."""

    folder: Path
    target: str
    state: str
    detail: str

    @property
    def has_ended(self) -> bool:
        return self.state in LAUNCHERS[self.target].end_states


def newest(work: WorkDir) -> Path:
    """The last launch of a work directory. Raises LaunchError where there is none, or where it is not to be seen."""
    require_folder(work.launches, may_link=False)
    try:
        os.listdir(work.launches)
    except PermissionError as error:
        raise LaunchError(
            f"{error.filename} belongs to {owner(error.filename)}, and only they may look into it",
            remedy="Ask them, or become that user",
        ) from error
    except OSError:  # not there
        pass
    folders = sorted(path.parent for path in work.launches.glob(f"*/{COMMAND}"))
    if not folders:
        raise LaunchError(
            f"{work.root} has no launch", remedy="Name the work directory of a run that rwkv-cluster launch started"
        )
    return folders[-1]


def target_of(folder: Path) -> str:
    """The launch.target that a launch was started on. Raises LaunchError where its command.json does not say."""
    try:
        target = json.loads(read_own(folder / COMMAND))["target"]
    except WrongKindError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LaunchError(f"{folder / COMMAND} cannot be read: it is not what a launch has left there") from error
    if not isinstance(target, str) or target not in LAUNCHERS:
        raise LaunchError(f"{folder / COMMAND} names {str(target)[:80]!r}, which is no launch.target")
    return target


def status(folder: Path) -> Status:
    """What a launch is doing now."""
    target = target_of(folder)
    return Status(folder, target, *LAUNCHERS[target].state(folder))


def follow(folder: Path, rank: int | None) -> Iterator[str]:
    """Text of the launch's logs, or of one rank's, as it comes, until the launch has ended."""
    launcher = LAUNCHERS[target_of(folder)]
    reader = launcher.logs([folder, *_members(folder)], rank)
    while True:
        ended = status(folder).has_ended
        yield from reader.read()
        if ended:
            return
        time.sleep(launcher.poll_s)


def logs(folder: Path, rank: int | None) -> str:
    """The logs so far. Raises LaunchError for a rank that has none."""
    text = "".join(LAUNCHERS[target_of(folder)].logs([folder, *_members(folder)], rank).read())
    if rank is not None and not text:
        raise LaunchError(f"{folder}: rank {rank} has not started, or does not exist")
    return text


def cancel(folder: Path, *, grace_s: float) -> Status:
    """Ask for a checkpoint and the end, and end what still runs after `grace_s`. Raises LaunchError."""
    before = status(folder)
    if before.has_ended:
        return before
    for run in (folder, *_members(folder)):
        os.close(open_own(run / "cancelled", os.O_WRONLY | os.O_CREAT, 0o600))
    launcher = LAUNCHERS[before.target]
    if grace_s > 0:
        launcher.cancel(folder, now=False)
        _wait_for_end(folder, grace_s)
    if not status(folder).has_ended:
        launcher.cancel(folder, now=True)
        _wait_for_end(folder, launcher.end_s)
    after = status(folder)
    if not after.has_ended:
        raise LaunchError(f"{folder}: it is {after.state} still, {after.detail}", remedy="Run cancel again")
    return after


def _wait_for_end(folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    poll_s = LAUNCHERS[target_of(folder)].poll_s
    while time.monotonic() < deadline and not status(folder).has_ended:
        time.sleep(poll_s)


def _members(folder: Path) -> list[Path]:
    """Launch directories of a sweep's runs; empty for one run."""
    with suppress(FileNotFoundError):
        return [Path(line) for line in read_own(folder / MEMBERS).decode().splitlines()]
    return []
