"""Before the ranks start: every node of the job is there, sees the same directory and runs the same code."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rwkv_cluster
from rwkv_cluster.errors import LaunchError

MEET_S = 120.0  # for all nodes to have started and for a shared directory to show what another node wrote


def check_nodes(state: Path, number: int, names: Sequence[str], *, first: bool, host: str) -> int | None:
    """Write, lock and rename in `state`, then compare notes with the other nodes.

    Returns a port that is free on the first node, the same on all; None for a job of one node without Slurm.
    Raises LaunchError, naming the node, or OSError where the directory cannot be used.
    """
    if "RWKV_CLUSTER_ATTEMPT" not in os.environ:
        return None
    _write(state / f"node-{number}", {"host": host, "code": code_digest(), "version": rwkv_cluster.__version__})
    if not first:
        return int(_read(state / "rendezvous", f"{names[0]}, the first node,", state)["port"])
    reports = [_read(state / f"node-{other}", f"node {name}", state) for other, name in enumerate(names)]
    for name, report in zip(names, reports, strict=True):
        if report["code"] != reports[0]["code"]:
            raise LaunchError(
                f"{name} runs other code than {names[0]}: version {report['version']}, digest {report['code'][:12]}, "
                f"expected {reports[0]['version']}, {reports[0]['code'][:12]}. Install the same version on all nodes"
            )
    port = _free_port()
    _write(state / "rendezvous", {"port": port})
    return port


def code_digest() -> str:
    """sha256 over the package's Python files."""
    digest = hashlib.sha256()
    for folder in rwkv_cluster.__path__:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _write(path: Path, facts: dict[str, Any]) -> None:
    """By lock and rename, which a run's checkpoints and its work directory's lock need too."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with open(temporary, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        handle.write(json.dumps(facts))
    os.replace(temporary, path)


def _read(path: Path, whose: str, state: Path) -> dict[str, Any]:
    deadline = time.monotonic() + float(os.environ.get("RWKV_CLUSTER_MEET_S", MEET_S))
    while time.monotonic() < deadline:
        os.listdir(path.parent)  # makes a network file system look again
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            time.sleep(0.1)
    raise LaunchError(
        f"{whose} has not been seen in {state}: it has not started, or does not see this directory. Look at its log, "
        "or leave the node out with launch.exclude"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
