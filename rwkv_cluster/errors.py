"""The one exception family, each member with its fixed exit code.

A message is for the person at the terminal and says: what went wrong, where, what was found, what was
wanted, and what to do next. The command line prints it without a traceback; every other exception is a
bug and keeps its traceback. Members also derive from the built-in that a Python caller would expect.
"""

from __future__ import annotations

import signal


class RWKVClusterError(Exception):
    """Base of every error that is the user's to mend. Exit code 1.

    what: what went wrong, what was found and what was wanted. where: the file or line that it is about, if `what` does
    not begin with it. remedy: what to do next. rank: the other rank that the error is about; None for an error of this
    rank's own. is_quoted: whether that rank has raised it, and this one repeats it. As a string it is one sentence:
    "rank N: where: what. remedy".
    """

    exit_code = 1

    def __init__(
        self, what: str = "", *, where: str = "", remedy: str = "", rank: int | None = None, is_quoted: bool = False
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy
        self.rank = rank
        self.is_quoted = is_quoted

    @property
    def message(self) -> str:
        """The text without the rank that has raised it."""
        place = f"{self.where}: " if self.where else ""
        return place + ". ".join(part for part in (self.what, self.remedy) if part)

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}" if self.is_quoted else self.message


class ConfigError(RWKVClusterError, ValueError):
    """The YAML file, an override or an argument is wrong. Exit code 2."""

    exit_code = 2


class DataError(RWKVClusterError, ValueError, RuntimeError):
    """Input data, a token file or a vocabulary is missing, malformed or unusable. Exit code 3.

    A RuntimeError too: rwkv-trainer raises that for data that was not prepared, is too small or is text for numbers.
    """

    exit_code = 3


class MissingDataError(DataError, FileNotFoundError):
    """An input or token file does not exist. Exit code 3."""


class CheckpointError(RWKVClusterError, RuntimeError):
    """A checkpoint or weights file is missing, damaged, unsafe or does not fit, or cannot be written. Exit code 4."""

    exit_code = 4


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A checkpoint or weights file does not exist. Exit code 4."""


class KernelError(RWKVClusterError, RuntimeError):
    """No WKV backend can run what was asked on this device. Exit code 5."""

    exit_code = 5


class KernelMemoryError(KernelError):
    """A compiled kernel has found no memory. Exit code 5."""


class LaunchError(RWKVClusterError, RuntimeError):
    """A job cannot be launched, or the work directory is held by another run. Exit code 6."""

    exit_code = 6


class TrainingError(RWKVClusterError, RuntimeError):
    """Training cannot go on, for instance after a non-finite loss. Exit code 1."""


class Preempted(RWKVClusterError):
    """A signal or a STOP file ended the run after a checkpoint; the same command continues. Exit code 75."""

    exit_code = 75


class Interrupted(BaseException):
    """A signal ends the command at once. No Exception: whatever handles faults must not take it for one.

    insisted: it was a second Ctrl-C or SIGTERM. The exit code is the one with which a shell reports a signal.
    """

    def __init__(self, number: int, *, insisted: bool = False) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.insisted = insisted
        self.exit_code = 128 + number


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "training failed, or a bug in this program",
    2: "configuration",
    3: "data",
    4: "checkpoint",
    5: "kernel",
    6: "launch or lock",
    75: "preempted: run the same command again to continue",
    130: "interrupted by Ctrl-C, by another signal 128 and its number",
}
