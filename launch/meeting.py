"""Where the nodes of a job meet that are started one by one, each anew after it has ended: pods, SkyPilot's machines.

Slurm starts all nodes of a job together and numbers its starts. Elsewhere nobody does: a node that is lost comes back
alone, while the others end a little later. So each node says in the launch directory, under a new id, that it is there.
When the ids of all are new, the first node publishes them, and they are the next start; a node whose id was part of the
one before has not come back yet.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.launch_folder import STATE
from rwkv_cluster.launch.preflight import BadNode, patience_s, write_facts
from rwkv_cluster.runtime.exit_report import LAUNCH_VARIABLE

ATTEMPT_VARIABLE = "RWKV_CLUSTER_ATTEMPT"  # job and restart as the batch script says, or what the nodes agreed on
NODE_VARIABLE = "RWKV_CLUSTER_NODE"  # this node's number, where Slurm does not say it
NODES_VARIABLE = "RWKV_CLUSTER_NODES"  # names of the job's nodes, in order
POLL_S = 0.5
NAME_S = 120.0  # for a name to be known: a pod's comes a little after the pod


def join(environment: MutableMapping[str, str], variable: str) -> None:
    """Take part in the next start of the job, and put its name and this node's number into the environment.

    variable: has the number. Raises LaunchError, and BadNode for the first node that has not come.
    """
    missing = [name for name in (variable, NODES_VARIABLE, LAUNCH_VARIABLE) if name not in environment]
    if missing:
        raise LaunchError(f"{missing[0]} is not set: this is started by what rwkv-cluster launch writes")
    names = environment[NODES_VARIABLE].split()
    text = environment[variable]
    if not text.isdecimal() or int(text) >= len(names):
        raise LaunchError(f"{variable} is {text!r}, expected a number below {len(names)}")
    environment[NODE_VARIABLE] = text
    environment[ATTEMPT_VARIABLE] = meet(Path(environment[LAUNCH_VARIABLE]), int(text), names)
    _wait_for_name(names[0])


def meet(launch: Path, number: int, names: Sequence[str]) -> str:
    """Name of the start that this node is part of, the same on all nodes. Raises BadNode for one that does not come."""
    folder = launch / STATE / "meeting"
    folder.mkdir(parents=True, exist_ok=True)
    place, own = folder / f"node-{number}", uuid.uuid4().hex
    deadline = time.monotonic() + patience_s() * (1 if number == 0 else 2)  # the first one names who is missing
    absent = [names[0]]
    try:
        write_facts(place, {"id": own})
        while time.monotonic() < deadline:
            os.listdir(folder)  # makes a network file system look again
            start = _ids(folder / "start")
            if number == 0:
                ids = [_ids(folder / f"node-{other}")[:1] for other in range(len(names))]
                absent = [name for name, id in zip(names, ids, strict=True) if not id or id[0] in start]
                if not absent:
                    start = [id for (id,) in ids]
                    write_facts(folder / "start", {"ids": start})
            if own in start:
                return start[0]
            time.sleep(POLL_S)
        waited = "has not started" if number == 0 else f"has not said in {folder} that all nodes are there"
        remedy = "Look at its pod, or wait longer: launch.kubernetes.start_s"
        raise BadNode(absent[0], f"{waited} after {patience_s():.0f} s", remedy=remedy)
    except BaseException:  # so that nobody counts on this node
        with suppress(OSError):
            place.unlink()
        raise


def _wait_for_name(name: str) -> None:
    """Wait until the first node, where the ranks meet, is found by its name. Raises LaunchError."""
    deadline = time.monotonic() + NAME_S
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{name} is a name that leads nowhere after {NAME_S:.0f} s: {error.strerror}",
                    remedy="Look at the cluster's DNS and at the job's service",
                ) from None
        time.sleep(POLL_S)


def _ids(path: Path) -> list[str]:
    """Ids that a node, or the first node for all, has written; empty where there are none yet."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return list(facts["ids"] if "ids" in facts else [facts["id"]])
