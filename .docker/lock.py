"""Write the lock files of the image, with the Python and machine type of the image:

    python3.11 .docker/lock.py --extra-index-url=https://download.pytorch.org/whl/cpu

Each names versions and hashes of what pip chooses today for the dependencies in pyproject.toml. `common` is what both
variants have, `cpu` and `cuda` are torch and what comes with it, `build` and `nvcc` stay in the builder stages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
TOOLS = ["setuptools>=77", "wheel", "ninja"]
CUDA = "13.0"  # of torch's wheels on PyPI
NVCC = [f"nvidia-{name}=={CUDA}.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]


def resolve(requirements: list[str], *options: str, only_pypi: bool = False) -> dict[str, str]:
    """{"name==version": "sha256:..."} of what pip would install. only_pypi: whatever else this machine has set up."""
    environment = dict(os.environ)
    if only_pypi:
        environment |= {"PIP_CONFIG_FILE": os.devnull}
        environment.pop("PIP_FIND_LINKS", None)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report=-"]
    run = subprocess.run([*command, *options, *requirements], env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"pip found no set of packages that fits:\n{run.stderr}")
    found = {}
    for package in json.loads(run.stdout)["install"]:
        name = package["metadata"]["name"].lower().replace("_", "-")
        found[f"{name}=={package['metadata']['version']}"] = package["download_info"]["archive_info"]["hash"]
    return found


def write(name: str, packages: dict[str, str]) -> None:
    lines = [f"{package} --hash={found.replace('=', ':')}" for package, found in sorted(packages.items())]
    (ROOT / ".docker" / "lock" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["tensorboard"]]
    cpu = resolve(wanted, *sys.argv[1:])
    cuda = resolve(wanted, only_pypi=True)
    common = {package: found for package, found in cpu.items() if package in cuda}
    write("common", common)
    write("cpu", {package: found for package, found in cpu.items() if package not in common})
    write("cuda", {package: found for package, found in cuda.items() if package not in common})
    write("build", resolve(TOOLS))
    write("nvcc", resolve(NVCC, only_pypi=True))


if __name__ == "__main__":
    main()
