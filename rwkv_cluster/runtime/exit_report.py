"""What a rank tells the agent that started it (`rwkv_cluster.launch.agent`): its log, and how it ended.

torchrun and srun have one exit code for all failures of all ranks. These files say which rank ended how.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from rwkv_cluster.runtime.own_file import open_own, read_own
from rwkv_cluster.runtime.rank_env import rank

LAUNCH_VARIABLE = "RWKV_CLUSTER_LAUNCH"  # the launch directory, where logs are
STATE_VARIABLE = "RWKV_CLUSTER_STATE"  # a folder for each start of the job


def quoted_rank(message: str) -> int | None:
    """Number of the rank whose failure `message` repeats, as `rank 3: ...`; None for words of one's own."""
    found = re.match(r"rank (\d+): ", message)
    return int(found[1]) if found else None


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


def report_exit(code: int, message: str = "") -> None:
    """Say how this rank ends. Does nothing without an agent."""
    state = os.environ.get(STATE_VARIABLE)
    if state is not None:
        path = Path(state) / f"rank-{rank()}"
        said = {"rank": rank(), "host": socket.gethostname(), "code": code, "message": message}
        path.with_suffix(".tmp").write_text(json.dumps(said))
        path.with_suffix(".tmp").rename(path)


def loses_exit_codes() -> bool:
    """Whether the launcher has a code of its own for every rank that does not end with 0: torchrun without an agent."""
    return "TORCHELASTIC_RUN_ID" in os.environ and STATE_VARIABLE not in os.environ


def read_exit_report(state: Path, number: int) -> dict[str, Any] | None:
    """How rank `number` said that it ended; None while it has said nothing."""
    try:
        return json.loads(read_own(state / f"rank-{number}"))
    except OSError:
        return None
