"""Log and exit report of a rank, for the agent that started it (`rwkv_cluster.launch.agent`).

torchrun and srun have one exit code for all failures of all ranks. The reports say which rank ended how.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rwkv_cluster.errors import RWKVClusterError
from rwkv_cluster.runtime.own_file import open_own, read_own
from rwkv_cluster.runtime.rank_env import rank

LAUNCH_VARIABLE = "RWKV_CLUSTER_LAUNCH"  # the launch directory, where logs are
STATE_VARIABLE = "RWKV_CLUSTER_STATE"  # a folder for each start of the job


@dataclass(frozen=True)
class ExitReport:
    """How a rank ended.

    Attributes:
        rank: its number.
        host: the machine that it ran on.
        code: its exit code.
        message: sentence of the error that it ended with; empty without one.
        about: the other rank that the error is about; None for an error of its own.
        is_quoted: whether `about` has raised the error, and this rank repeats it.
    """

    rank: int
    host: str
    code: int
    message: str
    about: int | None = None
    is_quoted: bool = False

    @property
    def origin(self) -> int:
        """The rank that has raised the error."""
        return self.about if self.is_quoted and self.about is not None else self.rank


def rank_log(launch: Path, number: int) -> Path:
    """Log of a rank, appended to by each start of the job."""
    return launch / f"rank-{number}.log"


def redirect_output_to_rank_log() -> None:
    """Send what this process and its libraries write to the rank's own log. Does nothing without an agent."""
    launch = os.environ.get(LAUNCH_VARIABLE)
    if launch is None or STATE_VARIABLE not in os.environ:
        return
    descriptor = open_own(rank_log(Path(launch), rank()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def report_exit(code: int, failure: RWKVClusterError | str = "") -> None:
    """Write this rank's exit report. Does nothing without an agent. failure: why it ends, empty after success."""
    state = os.environ.get(STATE_VARIABLE)
    if state is None:
        return
    report = ExitReport(rank(), socket.gethostname(), code, str(failure))
    if isinstance(failure, RWKVClusterError):
        report = replace(report, message=failure.message, about=failure.rank, is_quoted=failure.is_quoted)
    path = Path(state) / f"rank-{rank()}"
    path.with_suffix(".tmp").write_text(json.dumps(asdict(report)))
    path.with_suffix(".tmp").rename(path)


def loses_exit_codes() -> bool:
    """Whether the launcher has a code of its own for every rank that does not end with 0: torchrun without an agent."""
    return "TORCHELASTIC_RUN_ID" in os.environ and STATE_VARIABLE not in os.environ


def read_exit_report(state: Path, number: int) -> ExitReport | None:
    """The exit report of rank `number`, None while there is none."""
    try:
        return ExitReport(**json.loads(read_own(state / f"rank-{number}")))
    except OSError:
        return None
