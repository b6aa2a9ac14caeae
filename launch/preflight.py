"""Checks before the ranks start: every node is there, sees the same directory and runs the same code."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import rwkv_cluster
from rwkv_cluster.errors import LaunchError

MEET_S = 120.0  # for all nodes to have started and for a shared directory to show what another node wrote


class BadNode(LaunchError):
    """A node that cannot take part. name: of the node, for Slurm to leave it out."""

    def __init__(self, name: str, what: str, *, remedy: str = "") -> None:
        super().__init__(f"{name} {what}", remedy=remedy)
        self.name = name


def check_nodes(state: Path, number: int, names: Sequence[str], *, first: bool) -> int | None:
    """Write, lock and rename in `state`, then compare notes with the other nodes.

    Returns a port that is free on the first node, the same on all; None for a job of one node without Slurm.
    Raises BadNode or OSError where the directory cannot be used.
    """
    if "RWKV_CLUSTER_ATTEMPT" not in os.environ:
        return None
    write_facts(state / f"node-{number}", installation())
    if not first:
        return int(_read(state / "rendezvous", names[0], patience_s=2 * patience_s())["port"])
    reports = [_read(state / f"node-{other}", name, patience_s()) for other, name in enumerate(names)]
    require_alike(names, reports)
    port = free_port()
    write_facts(state / "rendezvous", {"port": port})
    return port


def installation() -> dict[str, Any]:
    """Code and packages of this node, as `require_alike` compares them."""
    return {"code": code_digest(), "packages": packages()}


def require_alike(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> None:
    """Raises BadNode for one that runs other packages or other code than the first. reports: of `installation`."""
    for name, report in zip(names, reports, strict=True):
        if report["packages"] != reports[0]["packages"]:
            raise BadNode(
                name,
                f"has other packages than {names[0]}: {_difference(report, reports[0])}",
                remedy="Use the same environment or image on all nodes",
            )
        if report["code"] != reports[0]["code"]:
            raise BadNode(
                name,
                f"runs other code of rwkv_cluster than {names[0]}: its digest is {report['code'][:12]}, not "
                f"{reports[0]['code'][:12]}",
                remedy="Install the same on all nodes",
            )


def check_gpus(expected: int, host: str) -> None:
    """Raises BadNode where fewer GPUs than `expected` are seen: by nvidia-smi, without it by their device files."""
    if expected == 0:
        return
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        n_gpus = len(re.findall(r"^GPU \d+:", done.stdout, re.MULTILINE))
        answer = " ".join(f"{done.stdout} {done.stderr}".split())[:200] or "nothing"
    except FileNotFoundError:
        n_gpus, answer = len(list(Path("/dev").glob("nvidia[0-9]*"))), "no such program"
    except subprocess.TimeoutExpired:
        n_gpus, answer = 0, "nothing for 60 s"
    if n_gpus < expected:
        raise BadNode(host, f"has {n_gpus} GPUs, but launch.gpus_per_node is {expected}; nvidia-smi -L: {answer}")


def code_digest() -> str:
    """sha256 over the package's Python files."""
    digest = hashlib.sha256()
    for folder in rwkv_cluster.__path__:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def packages() -> dict[str, str]:
    """Version of Python and of each installed package: what an image or an environment consists of."""
    versions = {"python": platform.python_version()}
    for path in distributions():
        versions.setdefault(path.metadata["Name"], path.version)
    return versions


def _difference(report: dict[str, Any], first: dict[str, Any]) -> str:
    """The first package that differs."""
    own, other = report["packages"], first["packages"]
    name = min(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    return f"{name} {own.get(name, 'is missing')}, there {other.get(name, 'it is missing')}"


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write facts with flock and rename: this also tests that the file system supports both."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with open(temporary, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        handle.write(json.dumps(facts))
    os.replace(temporary, path)


def patience_s() -> float:
    """How long node 0 waits for the others. Others wait longer, so that node 0 reports the missing one."""
    return float(os.environ.get("RWKV_CLUSTER_MEET_S", MEET_S))


def _read(path: Path, name: str, patience_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        os.listdir(path.parent)  # makes a network file system look again
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            time.sleep(0.1)
    raise BadNode(
        name,
        f"has not been seen in {path.parent}: it has not started, or does not see this directory. Look at its log, "
        "or leave the node out with launch.exclude",
    )


def free_port() -> int:
    """A TCP port of this machine that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
