"""How a job ended: a line in its attempt's folder, by the first node that ends; the batch script reads it too."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rwkv_cluster.errors import CheckpointError, ConfigError, DataError, KernelError, LaunchError

MISTAKES = tuple(
    sorted(error.exit_code for error in (ConfigError, DataError, CheckpointError, KernelError, LaunchError))
)
"""Exit codes of what another start would meet again."""

How = Literal["preempted", "stopped", "failed"]
_HOWS: dict[str, How] = {how: how for how in get_args(How)}
_FILE = "outcome"
_SIGNAL = "signal"
_NO_SIGNAL = "-"


@dataclass(frozen=True)
class Outcome:
    """One job's end.

    Attributes:
        how: failed; or all ranks have saved and ended: preempted by a signal, stopped by a STOP file.
        exit_code: of the job.
        message: for people, one line.
        stop_signal: name of the signal that has preempted it.
    """

    how: How
    exit_code: int
    message: str
    stop_signal: str | None = None

    def write(self, state: Path) -> None:
        """Write `<how> <exit code> <signal or -> <message>`, unless another node already did or the disk refuses."""
        with suppress(OSError), open(state / _FILE, "x") as handle:
            words = (self.how, str(self.exit_code), self.stop_signal or _NO_SIGNAL, *self.message.split())
            handle.write(f"{' '.join(words)}\n")


def read_outcome(state: Path) -> Outcome | None:
    """The outcome in an attempt's folder; None before there is one."""
    try:
        how, code, stop_signal, message = (state / _FILE).read_text().rstrip("\n").split(" ", 3)
    except (FileNotFoundError, ValueError):  # or not written to its end
        return None
    return Outcome(_HOWS[how], int(code), message, None if stop_signal == _NO_SIGNAL else stop_signal)


def write_signal(state: Path, name: str) -> None:
    """Tell the other nodes of an attempt that this one was sent a signal to end."""
    with suppress(OSError):
        (state / _SIGNAL).write_text(name)


def read_signal(state: Path) -> str | None:
    """Name of the signal that some node of an attempt was sent; None without one."""
    try:
        os.listdir(state)  # makes a network file system look again
        return (state / _SIGNAL).read_text()
    except OSError:
        return None
