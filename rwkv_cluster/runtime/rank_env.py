"""Which process of a run this is, as its launcher says through the environment. The one place that reads that.

A variable that holds no number, and variables that contradict each other, raise ConfigError: what a shell or a batch
script has left behind must not look like a launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_cluster.errors import ConfigError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_START_VARIABLE = "RWKV_CLUSTER_START"  # names the start of processes that rank 0 starts itself, for all of them
_START = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, Lightning's own) has started this process."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ


def rank() -> int:
    """This process's number among all ranks; 0 without a launcher.

    Lightning's own launcher sets LOCAL_RANK only, on its one machine.
    """
    number = _number("RANK")
    return local_rank() if number is None else number


def local_rank() -> int:
    """This process's number among the ranks of its machine; 0 without a launcher."""
    return _number("LOCAL_RANK") or 0


def message_prefix() -> str:
    """`rank 3: ` before what this process says to people, "" without a launcher. Takes the variable as it is."""
    return f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK'))}: " if launched() else ""


def launched_world_size() -> int | None:
    """Number of ranks that a launcher has started, or None when there is none.

    Raises ConfigError where the launcher's variables contradict each other.
    """
    world_size = _number("WORLD_SIZE")
    if world_size is None:
        if rank() > 0:
            raise ConfigError(f"this process is rank {rank()}, but WORLD_SIZE is not set", remedy=_REMEDY)
        return None
    if rank() >= world_size:
        raise ConfigError(f"this process is rank {rank()}, but WORLD_SIZE is {world_size}", remedy=_REMEDY)
    if world_size > 1 and not launched():
        raise ConfigError(f"WORLD_SIZE is {world_size}, but neither RANK nor LOCAL_RANK is set", remedy=_REMEDY)
    return world_size


def require_meeting_point() -> None:
    """Raises ConfigError where a launcher has not said where the ranks meet, or which device is whose."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"this process is rank {rank()} of several, but {name} is not set", remedy=_REMEDY)
    for name in ("LOCAL_RANK", "MASTER_PORT"):
        _number(name)


def launched_local_world_size() -> int | None:
    """Ranks that the launcher started on this machine, or None where the launcher does not say."""
    return _number("LOCAL_WORLD_SIZE") or _number("LOCAL_SIZE")  # LOCAL_SIZE: deepspeed's launcher


_REMEDY = "Start the run with torchrun or `rwkv-cluster launch`, or unset RANK, LOCAL_RANK and WORLD_SIZE"


def _number(name: str) -> int | None:
    """The variable `name`, or None where it is not set. Raises ConfigError for anything but a number."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"the environment variable {name} is {text!r}, expected an integer >= 0", remedy=_REMEDY)
    return int(text)


def launch_id() -> str:
    """An id shared by all ranks of one launch, from the launcher's environment variables.

    Processes started by hand on a fixed port look alike each time.
    """
    if _START_VARIABLE in os.environ:
        return os.environ[_START_VARIABLE]
    if "RANK" not in os.environ:
        return f"started by {os.getppid() if launched() else os.getpid()}"
    return " ".join(os.environ.get(name, "-") for name in _START)


def name_this_launch() -> None:
    """Give this launch an id. Called by a process without a launcher before it starts the other ranks.

    They inherit it. What this process calls itself must not change with the variables that its launcher sets for it.
    """
    os.environ.setdefault(_START_VARIABLE, f"{os.getpid()} {uuid.uuid4().hex}")


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Leave the environment as it was.

    DeepSpeed and Lightning set RANK, MASTER_PORT and others also for a run of one process, which would look launched
    from then on.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def slurm_job() -> str | None:
    """Number of the Slurm job that this process is part of."""
    return os.environ.get("SLURM_JOB_ID")


def die_with_launcher() -> None:
    """Let the kernel kill this process when the one that launched it is gone.

    Without this the workers of a killed torchrun train on for ever, and a rank that waits for a killed rank 0 to open
    the process group waits for half an hour. Does nothing in a process that a person or a batch system started.
    """
    if rank() != 0 or launched_local_world_size() is not None:
        die_with_parent()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
