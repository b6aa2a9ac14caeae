"""`rwkv-cluster doctor`: what this machine has for training, and the reason for each thing that cannot be used.

Each check is a function that returns rows; a later check of the same kind is one more function in `CHECKS`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster import __version__
from rwkv_cluster.errors import KernelError

IMAGE_VARIABLE = "RWKV_CLUSTER_IMAGE"  # in a container image: the file that says what is in it


@dataclass(frozen=True)
class Row:
    """One line of the table. works: None where nothing is judged; False for what is missing and can be done without."""

    what: str
    found: str
    works: bool | None = None


def examine() -> list[Row]:
    """Every check's rows. Raises KernelError when a compiled kernel is there and computes something wrong."""
    return [row for check in CHECKS for row in check()]


def format(rows: list[Row]) -> str:
    """The rows as a table."""
    width = max(len(row.what) for row in rows)
    marks = {None: "    ", True: "ok  ", False: "none"}
    return "\n".join(f"{marks[row.works]}  {row.what:<{width}}  {row.found}" for row in rows)


def data(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows for --json."""
    return [asdict(row) for row in rows]


def _versions() -> list[Row]:
    import torch

    return [
        Row("rwkv-cluster", __version__),
        Row("python", f"{platform.python_version()} on {platform.machine()} {platform.system()}"),
        Row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]


def _image() -> list[Row]:
    """What the container image was built from; nothing outside of one."""
    described = os.environ.get(IMAGE_VARIABLE)
    if not described:
        return []
    try:
        contents = json.loads(Path(described).read_text())
        kernels = [" ".join([target, *names]) for target, names in contents["kernels"].items()]
        return [
            Row("image", f"variant {contents['variant']}, revision {contents['revision']}"),
            Row("image: WKV kernels", ", ".join(kernels) or "none"),
            Row("image: packages", f"{contents['packages']}, listed in {contents['sbom']}"),
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [Row("image", f"{described}, which {IMAGE_VARIABLE} names, cannot be read: {error!r}", False)]


def _cpu_kernels() -> list[Row]:
    from rwkv_cluster.kernels import loader

    found = loader.cpu()
    if isinstance(found, loader.Missing):
        return [Row("WKV kernels, CPU", f"{found.reason} The chunked PyTorch form serves instead.", False)]
    return [Row("WKV kernels, CPU", f"{found.target}, {found.path}", True)]


def _gpus() -> list[Row]:
    import torch

    from rwkv_cluster.kernels import loader

    if not torch.cuda.is_available():
        built_for = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return [Row("GPUs", f"torch finds none ({built_for})", False)]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(Row(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", True))
        found = loader.cuda(properties.name, (properties.major, properties.minor))
        if isinstance(found, loader.Missing):
            text = f"{found.reason} The chunked PyTorch form serves instead."
            rows.append(Row(f"WKV kernels, GPU {index}", text, False))
        else:
            rows.append(Row(f"WKV kernels, GPU {index}", f"{found.target}, {found.path}", True))
    return rows


def _compilers() -> list[Row]:
    from rwkv_cluster.kernels import build

    rows = []
    for what, find in (("C++ compiler", build.cpp_compiler), ("nvcc", build.cuda_compiler)):
        try:
            compiler = find()
            rows.append(Row(what, f"{compiler.version}, {compiler.command}", True))
        except build.BuildError as error:
            rows.append(Row(what, f"{error}", False))
    return rows


def _extras() -> list[Row]:
    installed = importlib.util.find_spec("fla") is not None
    text = "installed" if installed else "not installed; `pip install 'rwkv-cluster[fla]'` for wkv_backend fla"
    return [Row("flash-linear-attention", text, installed)]


def _self_test() -> list[Row]:
    """Every backend that is here, on small inputs, forward and backward, beside float64."""
    import torch

    from rwkv_cluster.kernels import self_test

    rows = []
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for backend, dtype, error, limit in self_test.run(device):
            name = f"{backend} on {device}, {str(dtype).removeprefix('torch.')}"
            if not error <= limit:
                raise KernelError(
                    f"The WKV backend {name} is wrong: relative error {error:.1e} where {limit:.0e} is allowed. "
                    f"Use another training.wkv_backend and report this with the output of `{sys.argv[0]} doctor --json`"
                )
            rows.append(Row(f"self-test: {name}", f"relative error {error:.1e}", True))
    return rows


CHECKS: tuple[Callable[[], list[Row]], ...] = (
    _versions,
    _image,
    _cpu_kernels,
    _gpus,
    _compilers,
    _extras,
    _self_test,
)
