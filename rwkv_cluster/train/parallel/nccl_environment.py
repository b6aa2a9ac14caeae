"""What torch's NCCL process group is told through the environment, where the user's environment does not say it.

What torch 2.6 to 2.13 do without it was read in their ProcessGroupNCCL and FlightRecorder, and in the pull requests in
brackets:

    TORCH_NCCL_HIGH_PRIORITY, TORCH_NCCL_DUMP_ON_TIMEOUT           all; the second is on by default from 2.7 on (143446)
    TORCH_NCCL_TRACE_BUFFER_SIZE, TORCH_NCCL_DEBUG_INFO_TEMP_FILE  all; from 2.8 on with a warning
    TORCH_FR_BUFFER_SIZE, TORCH_FR_DUMP_TEMP_FILE                  from 2.8 on (152563)

The recorder's size is 0 by default before 2.11 (172843). The process group dumps where its own copy of the size is not
0, which it reads by the old name alone; that has been 2000 by default since before 2.8 (142260): the new name will do.

Left as torch and NCCL have them, for want of a reason: how an error ends the process (TORCH_NCCL_ASYNC_ERROR_HANDLING,
which torchrun sets and which ends it in either form), the heartbeat of torch's own watchdog (which is no limit on
collectives: that is training.timeout_s), and every choice of algorithm, protocol, channel and network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, int, int]

ENTRIES = 2000
"""Collectives that a rank remembers: torch's default since it has one other than 0, 2.13's; some hundred bytes each."""

DUMP_PREFIX = "nccl_trace_rank_"
"""Beginning of a dump's name, before the number of the rank."""


@dataclass(frozen=True)
class _Setting:
    """A variable with its older names. since: the first torch that knows the new name."""

    value: str
    name: str
    old_name: str | None = None
    since: Version = (0, 0, 0)

    def missing(self, environment: Mapping[str, str], torch_version: Version) -> dict[str, str]:
        """The variable that is to be set, by the name that this torch calls it: it warns of another."""
        if self.name in environment or (self.old_name is not None and self.old_name in environment):
            return {}
        is_old = self.old_name is not None and torch_version < self.since
        return {str(self.old_name) if is_old else self.name: self.value}


def missing_variables(environment: Mapping[str, str], dumps: Path, torch_version: Version) -> dict[str, str]:
    """Variables to set before NCCL's process group is made; nothing that `environment` has in any of its names.

    dumps: folder for what each rank has exchanged last, written when a collective takes too long.

    TORCH_NCCL_HIGH_PRIORITY: a GPU's scheduler takes the blocks of a waiting reduction before those of the backward
    pass's next kernels, so that it begins while these run (pytorch pull requests 43796, 122830). No sum changes by it.
    Flight recorder: torch 2.6 to 2.10 record nothing by default, 2.6 writes nothing on a timeout, and each version
    writes it where the next run overwrites it: /tmp or the home directory.
    TORCH_NCCL_USE_COMM_NONBLOCKING: before 2.7.1 torch makes a communicator that is bound to a device non-blocking,
    in which NCCL 2.26 hangs now and then (pytorch issue 153960, pull request 154055).
    """
    settings = [_Setting("1", "TORCH_NCCL_HIGH_PRIORITY")]
    if torch_version < (2, 7, 1):
        settings.append(_Setting("0", "TORCH_NCCL_USE_COMM_NONBLOCKING"))
    buffer = _Setting(str(ENTRIES), "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", (2, 8, 0))
    if "0" not in {environment.get(buffer.name), environment.get(str(buffer.old_name))}:
        file = _Setting(
            str(dumps / DUMP_PREFIX), "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", (2, 8, 0)
        )
        settings += [buffer, _Setting("1", "TORCH_NCCL_DUMP_ON_TIMEOUT"), file]
    return {name: value for setting in settings for name, value in setting.missing(environment, torch_version).items()}


def version_of(text: str) -> Version:
    """(2, 7, 1) of "2.7.1+cu126" or "2.7.1a0"."""
    major, minor, rest = text.split("+")[0].split(".")[:3]
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return int(major), int(minor), int(digits)
