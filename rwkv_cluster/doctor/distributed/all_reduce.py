"""How fast the ranks add up, with NCCL between GPUs, else with gloo; and why they do not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta

from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.distributed.merge import Report, merged
from rwkv_cluster.doctor.distributed.rank_store import Meeting
from rwkv_cluster.doctor.results import Row, ok, problem, refused
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.runtime import nccl_shared_memory, rank_env

EXCHANGE_S = 60.0  # for one exchange; the first makes the connections
WHOLE_S = 120.0
LEAVE_S = 30.0  # for this process to end although NCCL does not return


def device_kind(context: CheckContext) -> str:
    """cuda where this rank has a GPU of its own that the run would use, else cpu."""
    import torch

    wants_cpu = context.config is not None and context.config.training.accelerator == "cpu"
    has_gpu = torch.cuda.is_available() and rank_env.local_rank() < torch.cuda.device_count()
    return "cuda" if has_gpu and not wants_cpu else "cpu"


def all_reduce(meeting: Meeting, device: str, reports: Mapping[int, Report]) -> list[Row]:
    """Measured by all ranks at once. On rank 0 one row, or those of the ranks where it failed.

    In a thread: NCCL can hang while it connects, where none of torch's time limits holds.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    text = f"{backend} has not connected the ranks and added up within {WHOLE_S:.0f} s"
    rows = [problem("all-reduce", text, _remedy(backend), LaunchError)]
    thread = threading.Thread(target=lambda: rows.append(_measured(meeting, backend, device)), daemon=True)
    thread.start()
    thread.join(WHOLE_S)
    if thread.is_alive():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(LEAVE_S))
    answers = meeting.gather("all-reduce", asdict(rows[-1]), range(meeting.world_size))
    results = {rank: Report(reports[rank].host, [Row(**row)]) for rank, row in answers.items()}
    failed = {rank: report for rank, report in results.items() if report.rows[0].state != "ok"}
    return merged(failed) if failed else rows[-1:]


def _measured(meeting: Meeting, backend: str, device: str) -> Row:
    import torch
    import torch.distributed as dist

    from rwkv_cluster.train.distributed.all_reduce_check import measure_all_reduce
    from rwkv_cluster.train.distributed.collectives import leaving_group

    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a late exchange raises, and aborts no process
    if backend == "nccl":
        nccl_shared_memory.disable_nccl_shm_if_small()  # as training does; the row of shared memory tells it
    place = torch.device(device, rank_env.local_rank()) if device == "cuda" else torch.device(device)
    try:
        with leaving_group():
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("all-reduce-group", meeting.store),
                rank=meeting.rank,
                world_size=meeting.world_size,
                timeout=timedelta(seconds=EXCHANGE_S),
                device_id=place if device == "cuda" else None,
            )
            measured = measure_all_reduce(place)
    except LaunchError as error:
        return refused("all-reduce", error)
    except (RuntimeError, ValueError, OSError) as error:  # torch's, whose words are for this person
        reason = " ".join(str(error).split())[:300]
        return problem("all-reduce", f"{backend} does not connect the ranks: {reason}", _remedy(backend), LaunchError)
    return ok("all-reduce", f"{backend}: {str(measured).removeprefix('all-reduce of ')}", figure=measured.bus_gb_per_s)


def _remedy(backend: str) -> str:
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    more = " and read what NCCL_DEBUG=INFO shows" if backend == "nccl" else ""
    return f"Set {variable} to the network that joins the nodes (launch.env){more}"
