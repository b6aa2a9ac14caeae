"""What the sessions of a run ran on: versions and machine, in `logs/environment.json`, for those who read it later.

    {"sessions": [{"step": 0, "time": 1764158400.1, "host": "node-7", "torch": "2.13.0", ...}, ...]}

A session that finds everything as the one before it left it adds nothing, so that the file stays small and says where
something has changed.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rwkv_cluster import __version__
from rwkv_cluster.runtime import control_group
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.own_file import read_own
from rwkv_cluster.runtime.rank_env import slurm_job
from rwkv_cluster.train.placement import Placement, memory_bytes
from rwkv_cluster.workdir import atomic_write

PACKAGES = ("pytorch-lightning", "deepspeed", "numpy")
_CHANGING = ("step", "time", "slurm_job")


def record(path: Path, placement: Placement, start_step: int) -> None:
    """Add this session, which starts after `start_step`, as its rank 0 sees it. Raises CheckpointError."""
    sessions = _sessions(path)
    facts = {"step": start_step, "time": time.time(), "slurm_job": slurm_job(), **_facts(placement)}
    if sessions and _lasting(sessions[-1]) == _lasting(facts):
        return
    content = (json.dumps({"sessions": [*sessions, facts]}, indent=1) + "\n").encode()
    with writing(path, len(content)):
        atomic_write(path, content)


def _sessions(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(read_own(path))["sessions"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in _CHANGING}


def _facts(placement: Placement) -> dict[str, Any]:
    """memory_gb: of the GPU on CUDA, of the machine elsewhere; threads: of this rank."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": _device(placement.accelerator),
        "memory_gb": round(_memory_bytes(placement) / 1e9, 1),
        "ranks": placement.world_size,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "rwkv-cluster": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(accelerator: str) -> str:
    """The GPU's name, or the CPU's as Linux knows it."""
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_bytes(placement: Placement) -> float:
    return memory_bytes(placement) if placement.accelerator == "cuda" else control_group.total_memory_bytes()
