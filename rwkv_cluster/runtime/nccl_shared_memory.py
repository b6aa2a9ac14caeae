"""/dev/shm, through which NCCL moves what the GPUs of a machine cannot send each other directly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PLACE = Path("/dev/shm")
WANTED_BYTES = 2**30  # NVIDIA's advice for NCCL in containers: --shm-size=1g --ulimit memlock=-1
SWITCH = "NCCL_SHM_DISABLE"
REMEDY = "Give the container more (`--shm-size=16g` or `--ipc=host`, launch.container.shm_size)"


def usage() -> tuple[int, int]:
    """Bytes free and bytes in all. Raises OSError where /dev/shm cannot be examined."""
    usage = shutil.disk_usage(PLACE)
    return usage.free, usage.total


def disable_nccl_shm_if_small() -> str | None:
    """Keep NCCL from /dev/shm where there is too little room in it; the sentence to tell, or None where all is well.

    To be called before the process group is made. NCCL would end the run with a bus error or `No space left on device`;
    without its transport through shared memory it uses the network's, also inside a machine (NCCL user guide,
    NCCL_SHM_DISABLE). What the caller's environment says about that is left as it is.
    """
    if SWITCH in os.environ:
        return None
    try:
        free, total = usage()
    except OSError as error:
        reason = f"{PLACE} cannot be used ({error.strerror})"
    else:
        if free >= WANTED_BYTES:
            return None
        reason = f"{PLACE} has {free >> 20:,} MiB free of {total >> 20:,}, and NCCL wants {WANTED_BYTES >> 20:,}"
    os.environ[SWITCH] = "1"
    return (
        f"{reason}: NCCL goes without shared memory ({SWITCH}=1), which is slower between GPUs without a direct link. "
        f"{REMEDY}, or set {SWITCH}=0 to have it tried"
    )
