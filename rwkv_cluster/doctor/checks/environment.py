"""Environment variables that change how training runs; never one that may hold a secret."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from rwkv_cluster.config.launch import looks_secret
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, ok, warning

PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "OMP_", "KMP_", "GOMP_", "MKL_", "PYTORCH_", "RWKV_CLUSTER_")
NAMES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"),
    *("DS_ACCELERATOR", "LD_PRELOAD", "PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"),
)
LONGEST = 120  # characters of a value that are shown
SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
    "NCCL_P2P_DISABLE": "GPUs of a machine do not send to each other directly",
    "NCCL_IB_DISABLE": "NCCL leaves InfiniBand alone",
    "NCCL_SHM_DISABLE": "NCCL leaves shared memory alone",
}


def variables(context: CheckContext) -> list[Row]:
    """Those that are set, and a warning for each that slows training down or names what is not here."""
    chosen = relevant(os.environ)
    text = " ".join(f"{name}={value}" for name, value in chosen.items()) or "nothing that matters is set"
    rows = [ok("environment", text)]
    for name, effect in SLOW.items():
        if chosen.get(name, "0") not in ("", "0"):
            rows.append(warning(name, f"{name} is set: {effect}, which is slow", f"Unset {name} unless you need it"))
    here = [name for _, name in socket.if_nameindex()]
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in chosen and not _has_interface(chosen[name], here):
            text = f"{name} is {chosen[name]}, but the interfaces of this machine are {', '.join(here)}"
            rows.append(warning(name, text, f"Set {name} to the one that joins the nodes, or unset it"))
    return rows


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of `environment` that matter, sorted, with long values shortened and control characters escaped."""
    names = (name for name in sorted(environment) if name in NAMES or name.startswith(PREFIXES))
    return {name: _shown(environment[name]) for name in names if not looks_secret(name)}


def _shown(value: str) -> str:
    text = value if value.isprintable() else ascii(value)[1:-1]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _has_interface(interface: str, here: list[str]) -> bool:
    """NCCL's syntax: names or their beginnings, =exact names, ^those to leave out; gloo's are exact names."""
    if interface.startswith("^"):
        return True
    exact = interface.startswith("=")
    names = interface.removeprefix("=").split(",")
    return any(name == known or (not exact and known.startswith(name)) for name in names for known in here)
