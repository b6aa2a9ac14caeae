"""What ranks find only together: who is there, whether they are alike, their clocks, directory and network."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rwkv_cluster.doctor.checks.host import numbers
from rwkv_cluster.doctor.checks.storage import SKEW_S
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.distributed.all_reduce import all_reduce, device_kind
from rwkv_cluster.doctor.distributed.merge import Report, merged, who
from rwkv_cluster.doctor.distributed.rank_store import meet
from rwkv_cluster.doctor.distributed.shared_folder import shared_directory
from rwkv_cluster.doctor.results import Row, ok, problem, refused, warning
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.preflight import BadNode, installation, patience_s, require_alike
from rwkv_cluster.runtime import rank_env


def examined_together(own: list[Row], context: CheckContext, world_size: int) -> list[Row]:
    """Rows of the whole job on rank 0; on the others nothing, for rank 0 speaks for all.

    own: what this rank has found. Raises LaunchError on a rank that cannot reach rank 0.
    """
    try:
        meeting = meet(world_size, rank_env.rank(), patience_s())
    except LaunchError as error:
        if rank_env.rank() != 0:
            raise
        return [*own, refused("ranks", error)]
    mine: dict[str, Any] = {
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "rows": [asdict(row) for row in own],
    }
    mine |= {"installation": installation(), "device": device_kind(context)}
    arrived = meeting.gather("arrived", mine, range(world_size))
    present = meeting.tell("present", sorted(arrived))
    times = meeting.gather("time", time.time(), present)
    reports = {rank: Report(said["host"], [Row(**row) for row in said["rows"]]) for rank, said in arrived.items()}
    shared = shared_directory(meeting, context.folder, present, reports)
    device = meeting.tell("device", "cuda" if all(said["device"] == "cuda" for said in arrived.values()) else "cpu")
    network = all_reduce(meeting, device, reports) if len(present) == world_size else []
    if meeting.rank != 0:
        return []
    rows = [_attendance(reports, world_size), _alike(arrived, reports), _clocks(times, reports)]
    return [*merged(reports), *rows, *shared, *network]


def _attendance(reports: Mapping[int, Report], world_size: int) -> Row:
    absent = [rank for rank in range(world_size) if rank not in reports]
    hosts = len({report.host for report in reports.values()})
    if not absent:
        return ok("ranks", f"{world_size} on {hosts} machine{'s' if hosts > 1 else ''}")
    text = f"{len(absent)} of {world_size} ranks have not come within {patience_s():.0f} s: {numbers(absent)}"
    return problem("ranks", text, "Look at what they say, and at their nodes", LaunchError)


def _alike(arrived: Mapping[int, dict[str, Any]], reports: Mapping[int, Report]) -> Row:
    try:
        require_alike([who([rank], reports) for rank in arrived], [said["installation"] for said in arrived.values()])
    except BadNode as error:
        return refused("installations", error)
    return ok("installations", "the same Python, packages and code of rwkv_cluster on all ranks")


def _clocks(times: Mapping[int, float], reports: Mapping[int, Report]) -> Row:
    """Clocks beside rank 0's. All looked at them when it said who is present, which reaches them in milliseconds."""
    skews = {rank: time_s - times[0] for rank, time_s in times.items()}
    worst = max(skews, key=lambda rank: abs(skews[rank]))
    if abs(skews[worst]) <= SKEW_S:
        return ok("clocks", f"at most {abs(skews[worst]):.1f} s apart")
    side = "ahead of" if skews[worst] > 0 else "behind"
    text = f"that of {who([worst], reports)} is {abs(skews[worst]):.0f} s {side} rank 0's"
    text += ": times in logs and of files do not fit"
    return warning("clocks", text, "Synchronise the nodes with chrony or ntpd")
