"""Python, torch and what else training imports, and the compilers that build kernels."""

from __future__ import annotations

import functools
import importlib.util
import platform
from importlib import metadata

from rwkv_cluster import __version__
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok, problem, warning
from rwkv_cluster.errors import LaunchError

INSTALL = "Install it in this environment: `pip install rwkv-cluster` brings what training needs"


@functools.cache
def has_torch() -> bool:
    """Whether torch can be imported; `torch_itself` says why not."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def versions(context: CheckContext) -> list[Row]:
    """Versions of this package and of Python."""
    python = f"{platform.python_version()} on {platform.machine()} {platform.system()} {platform.release()}"
    return [ok("rwkv-cluster", __version__), ok("python", python)]


def torch_itself(context: CheckContext) -> list[Row]:
    """torch itself. Its import fails with OSError where a library that it links is missing."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [problem("torch", f"torch cannot be imported: {error}", INSTALL, LaunchError)]
    return [ok("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]


def packages(context: CheckContext) -> list[Row]:
    """What training imports beside torch; without importing it."""
    rows = []
    for name, module in (("pytorch-lightning", "pytorch_lightning"), ("numpy", "numpy")):
        if importlib.util.find_spec(module) is None:
            rows.append(problem(name, f"the package {name} is not installed", INSTALL, LaunchError))
        else:
            rows.append(ok(name, metadata.version(name)))
    if importlib.util.find_spec("fla") is None:
        remedy = "`pip install 'rwkv-cluster[fla]'`, for training.wkv_backend fla alone"
        return [*rows, note("flash-linear-attention", "not installed", remedy)]
    return [*rows, ok("flash-linear-attention", "installed")]


def compilers(context: CheckContext) -> list[Row]:
    """What builds WKV libraries; and what torch.compile needs, which training on a GPU uses where it can."""
    from rwkv_cluster.kernels import build

    rows = []
    for name, find in (("C++ compiler", build.cpp_compiler), ("nvcc", build.cuda_compiler)):
        try:
            compiler = find()
            rows.append(ok(name, f"{compiler.version}, {compiler.command}"))
        except build.BuildError as error:
            rows.append(note(name, f"{error}".rstrip(".")))
    return [*rows, *_torch_compile()]


def _torch_compile() -> list[Row]:
    """Whether torch.compile can run on the GPUs of this machine, which training.fused auto takes without a library."""
    if not has_torch():
        return []
    import torch

    from rwkv_cluster.kernels.fused import ops as fused

    if not torch.cuda.is_available():
        return []
    missing = fused.missing_for_compile("cuda")
    if missing is None:
        return [ok("torch.compile", "Triton finds a C compiler and Python's headers")]
    text = f"it needs {missing}, which is not here"
    if fused.has_native("cuda"):
        return [note("torch.compile", f"{text}: training.fused auto takes the compiled library where it serves")]
    text += ": training.fused auto takes plain, which is slower"
    return [warning("torch.compile", text, "Install it, on Debian with `apt-get install gcc python3-dev`")]
