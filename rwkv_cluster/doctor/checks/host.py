"""What the operating system gives this process: processors, memory, shared memory and limits."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from rwkv_cluster.doctor.checks.gpus import listed
from rwkv_cluster.doctor.checks.software import has_torch
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok, warning
from rwkv_cluster.runtime import control_group, rank_env
from rwkv_cluster.runtime import nccl_shared_memory as shm

OPEN_FILES = 1024  # what Linux gives by default; each rank has sockets to others, libraries and the data's files
LOCKED_BYTES = 64 * 2**20  # far below what an InfiniBand adapter registers
STACK_BYTES = 8 * 2**20  # what Linux gives by default, also to each thread
INFINIBAND = Path("/sys/class/infiniband")


def processors(context: CheckContext) -> list[Row]:
    """CPUs of the machine and of this process, beside the threads of the ranks here."""
    total, own, quota = os.cpu_count() or 1, sorted(os.sched_getaffinity(0)), control_group.cpu_quota()
    text = f"{total}, of which this process may use {len(own)} ({numbers(own)})"
    text += f", in a control group with the time of {quota:.3g}" if quota < len(own) else ""
    if not has_torch():
        return [ok("CPUs", text)]
    import torch

    threads = (context.config.training.num_threads if context.config else None) or torch.get_num_threads()
    n_ranks = rank_env.launched_local_world_size() or 1
    room = min(total, quota)
    if threads > len(own) or threads * n_ranks > room:
        text += (
            f"; the threads of {n_ranks} rank{'s' if n_ranks > 1 else ''}, {threads} each, would wait for each other"
        )
        share = max(1, min(len(own), int(room) // n_ranks))
        return [warning("CPUs", text, f"Set training.num_threads or OMP_NUM_THREADS to {share}")]
    return [ok("CPUs", text)]


def memory(context: CheckContext) -> list[Row]:
    """Memory of the machine, and the limit of this process's control group where that is lower."""
    total, limit = control_group.total_memory_bytes(), control_group.memory_bytes()
    text = f"{total / 2**30:.0f} GiB"
    return [ok("memory", text if limit == total else f"{text}, limited to {limit / 2**30:.1f} GiB")]


def shared_memory(context: CheckContext) -> list[Row]:
    """Where NCCL exchanges what GPUs of a machine cannot send each other directly."""
    try:
        free, total = shm.usage()
    except OSError as error:
        return [warning("shared memory", f"{shm.PLACE}: {error.strerror}", "Mount a tmpfs there")]
    text = f"{free / 2**20:,.0f} MiB free of {total / 2**20:,.0f} in {shm.PLACE}"
    if free >= shm.WANTED_BYTES:
        return [ok("shared memory", text)]
    if len(listed()) < 2:
        return [note("shared memory", f"{text}; enough without several GPUs")]
    text += ": training keeps NCCL from using it, which is slower between GPUs without a direct link"
    stale = f", or remove what dead processes left ({shm.PLACE}/nccl-*)"
    return [warning("shared memory", text, shm.REMEDY + stale)]


def limits(context: CheckContext) -> list[Row]:
    """Open files, locked memory, stack: the soft limits, which bind."""
    return [_open_files(), _locked_memory(), _stack()]


def numbers(values: list[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        text = f"{soft} may be open at once: ranks can fail with `Too many open files`"
        highest = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        remedy = f"`ulimit -n 65536` before the start (allowed here: {highest}), under Slurm in launch.setup"
        return warning("limit: open files", text, remedy)
    return ok("limit: open files", _count(soft))


def _locked_memory() -> Row:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= soft < LOCKED_BYTES and INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        text = f"{soft / 1024:,.0f} KiB, too little for this machine's InfiniBand: NCCL fails to register memory"
        remedy = "`ulimit -l unlimited`, for containers `--ulimit memlock=-1`, for Slurm LimitMEMLOCK of slurmd"
        return warning("limit: locked memory", text, remedy)
    return ok("limit: locked memory", _size(soft))


def _stack() -> Row:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if 0 <= soft < STACK_BYTES:
        text = f"{soft / 1024:,.0f} KiB: libraries that count on the usual 8 MiB can crash"
        return warning("limit: stack", text, "`ulimit -s 8192`, for containers `--ulimit stack=67108864`")
    return ok("limit: stack", _size(soft))


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _size(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 1024:,.0f} KiB"
