"""DeepSpeed and its operators, read from the files of its installation: importing it takes seconds and is noisy."""

from __future__ import annotations

import ast
import importlib.util
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from rwkv_cluster.doctor.checks.software import INSTALL
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok


def deepspeed(context: CheckContext) -> list[Row]:
    """Its version, and which operators are compiled already. Whether a run can use it, `needs` says."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return [note("DeepSpeed", "not installed", f"It serves training.zero_stage. {INSTALL}")]
    rows = [ok("DeepSpeed", metadata.version("deepspeed"))]
    built = prebuilt(Path(spec.submodule_search_locations[0]))
    ready = ", ".join(name for name in sorted(built) if built[name]) or "none"
    others = ", ".join(name for name in sorted(built) if not built[name]) or "none"
    text = f"prebuilt: {ready}; compiled when first asked for: {others}; {_compilers()}. Training asks for none"
    return [*rows, ok("DeepSpeed operators", text)]


def prebuilt(folder: Path) -> dict[str, bool]:
    """Operator -> whether the installation compiled it, as DeepSpeed's setup.py wrote down; empty where it did not.

    The file holds assignments of constants, such as `installed_ops={'async_io': False}`.
    """
    with suppress(OSError, SyntaxError, ValueError):
        for node in ast.parse((folder / "git_version_info_installed.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "installed_ops":
                compatible = dict(ast.literal_eval(node.value))
                return {name: bool(compatible[name]) for name in compatible if name != "deepspeed_not_implemented"}
    return {}


def _compilers() -> str:
    """Whether what compiles them is here: g++ for those of the CPU, nvcc of torch's CUDA for the others."""
    from rwkv_cluster.kernels import build

    missing = []
    for name, find in (("a C++ compiler", build.cpp_compiler), ("nvcc", build.cuda_compiler)):
        try:
            find()
        except build.BuildError:
            missing.append(name)
    return f"for that {' and '.join(missing)} is missing" if missing else "the compilers for that are here"
