"""The driver and the GPUs, by nvidia-smi, and what torch makes of them."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.doctor.checks.software import has_torch
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok, warning
from rwkv_cluster.doctor.subprocesses import output_of

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits")
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
IN_USE = 0.1  # of a GPU's memory, before another program is to be thought of; a display or a context takes less


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it. Memory in MiB; None where this GPU does not say."""

    name: str
    total_mib: float | None
    used_mib: float | None
    driver: str


@functools.cache
def listed() -> tuple[Gpu, ...]:
    """Every GPU that the driver shows to this process, whatever CUDA_VISIBLE_DEVICES says; needs no torch."""
    gpus = []
    for line in (output_of(*QUERY) or "").splitlines():
        fields = [field.strip() for field in line.rsplit(",", 3)]
        if len(fields) == 4:
            gpus.append(Gpu(fields[0], _number(fields[1]), _number(fields[2]), fields[3]))
    return tuple(gpus)


def driver(context: CheckContext) -> list[Row]:
    """The driver, and each GPU with its memory."""
    gpus = listed()
    if not gpus and KERNEL_DRIVER.exists():
        text = "the NVIDIA driver is loaded, but nvidia-smi shows no GPU"
        remedy = "Look at `nvidia-smi` and `dmesg`; in a container give it the GPUs (`--gpus all`, `--nv`)"
        return [warning("driver", text, remedy)]
    if not gpus:
        return [note("driver", "nvidia-smi shows no GPU")]
    return [ok("driver", gpus[0].driver), *(_row(f"GPU {index}", gpu) for index, gpu in enumerate(gpus))]


def torch_cuda(context: CheckContext) -> list[Row]:
    """What torch sees, and why it sees none."""
    if not has_torch():
        return []
    import torch

    built_for = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
    with warnings.catch_warnings(record=True) as warned:  # by torch, where the driver does not suit it
        warnings.simplefilter("always")
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus:
        return [ok("CUDA", f"torch finds {n_gpus} GPUs ({built_for})")]
    text = f"torch finds none ({built_for})"
    if not listed():
        return [note("CUDA", text)]
    reason = f": {' '.join(str(warned[0].message).split())[:300]}" if warned else ""
    remedy = "Install a torch that fits this driver (https://pytorch.org/get-started), or unset CUDA_VISIBLE_DEVICES"
    return [warning("CUDA", f"nvidia-smi shows GPUs, but {text}{reason}", remedy)]


def _row(name: str, gpu: Gpu) -> Row:
    text = gpu.name if gpu.total_mib is None else f"{gpu.name}, {gpu.total_mib / 1024:.0f} GiB"
    if gpu.total_mib and gpu.used_mib and gpu.used_mib > IN_USE * gpu.total_mib:
        text = f"{text}, of which {gpu.used_mib / 1024:.0f} are in use"
        return warning(name, text, "Find by what with `nvidia-smi`, and end it or choose other GPUs")
    return ok(name, text)


def _number(text: str) -> float | None:
    """nvidia-smi writes [N/A] or [Not Supported] for what a GPU has no number of."""
    try:
        return float(text)
    except ValueError:
        return None
