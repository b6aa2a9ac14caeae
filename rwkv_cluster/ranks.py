"""Which process of a run this is, as its launcher says through the environment. The one place that reads that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
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
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def local_rank() -> int:
    """This process's number among the ranks of its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_world_size() -> int | None:
    """Number of ranks that a launcher has started, or None when there is none."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def launched_local_world_size() -> int | None:
    """Number of those that are on this machine, or None where the launcher does not say."""
    value = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # LOCAL_SIZE: deepspeed's launcher
    return int(value) if value else None


def attempt() -> str:
    """What the ranks of one start of a run have in common, and those of other starts mostly do not.

    Processes started by hand on a fixed port look alike each time.
    """
    if "RANK" not in os.environ:  # rank 0 starts the others itself: Lightning's own launcher
        return f"started by {os.getppid() if launched() else os.getpid()}"
    return " ".join(os.environ.get(name, "-") for name in _START)


def slurm_job() -> str | None:
    """Number of the Slurm job that this process is part of."""
    return os.environ.get("SLURM_JOB_ID")


def end_with_launcher() -> None:
    """Let the kernel kill this process when the one that launched it is gone.

    Without this the workers of a killed torchrun train on for ever, and a rank that waits for a killed rank 0 to open
    the process group waits for half an hour. Does nothing in a process that a person or a batch system started.
    """
    if rank() != 0 or launched_local_world_size() is not None:
        end_with_parent()


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
