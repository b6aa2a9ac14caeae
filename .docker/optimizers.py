"""Compile DeepSpeed's fused optimizers ahead of time, in the folder of its unpacked sources:

    optimizers.py DESTINATION VARIANT [ARCHITECTURE...]

DeepSpeed's own setup.py does the work. DESTINATION gets the libraries, and the file in which DeepSpeed looks up what is
compiled, at their places below the prefix of this Python. ARCHITECTURE: of GPUs, such as 90.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

OPERATORS = {
    "cpu": ("CPU_ADAM",),
    "cuda": ("FUSED_ADAM", "FUSED_LAMB", "FUSED_LION", "CPU_ADAM"),
}
# For every x86-64 processor with AVX2; DeepSpeed asks for the one that it is compiled on.
CPU_FLAGS = ["-O3", "-march=x86-64-v3", "-fopenmp", "-D__AVX256__"]


def main(destination: Path, variant: str, architectures: Sequence[str]) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    os.environ |= {f"DS_BUILD_{name}": "1" for name in OPERATORS[variant]}
    os.environ |= {"DS_ENABLE_NINJA": "1", "DS_ACCELERATOR": variant}  # it would look for a device
    if variant == "cuda":
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(f"{name[:-1]}.{name[-1]}" for name in architectures) + "+PTX"
        os.environ["CPATH"] = str(packages / "nvidia/cu13/include")  # of CUDA's libraries, which come with torch
    sys.path.insert(0, os.getcwd())
    from op_builder.cpu.builder import CPUOpBuilder  # of DeepSpeed's sources

    CPUOpBuilder.cxx_args = lambda self: list(CPU_FLAGS)
    sys.argv = ["setup.py", "-q", "build", "--build-lib", "built"]
    runpy.run_path("setup.py", run_name="__main__")
    built = Path("built")
    libraries = [*built.rglob("*_op.*.so")]
    subprocess.run(["strip", "--strip-debug", *libraries], check=True)
    for path in (*libraries, *built.rglob("git_version_info_installed.py")):
        target = destination / packages.relative_to(sys.prefix) / path.relative_to(built)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
