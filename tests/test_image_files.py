"""The image's files agree with the package: versions, architectures, locked packages. tests/system runs the image."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rwkv_cluster
from rwkv_cluster.kernels.build import CUDA_ARCHITECTURES

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCK = ROOT / ".docker" / "lock"


def locked(*names: str) -> dict[str, str]:
    """Package -> version; fails where a line is without a hash."""
    found = {}
    for name in names:
        for line in (LOCK / f"{name}.txt").read_text().splitlines():
            match = re.fullmatch(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
            assert match, f"{name}.txt: {line}"
            found[match[1]] = match[2]
    return found


def defaults(name: str) -> set[str]:
    """Every default that the Dockerfile gives a build argument."""
    return {value.strip('"') for value in re.findall(rf"^ARG {name}=(.*)$", DOCKERFILE, re.MULTILINE)}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_lock_satisfies_the_package(variant: str) -> None:
    versions = locked("common", variant)
    needed = [Requirement(line) for line in importlib.metadata.requires("rwkv-cluster") or ()]
    for wanted in (each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})):
        assert wanted.specifier.contains(versions[wanted.name.lower()]), f"{wanted}, locked: {versions[wanted.name]}"


def test_tools_are_locked_too() -> None:
    assert {"ninja", "setuptools", "wheel"} <= locked("build").keys()
    assert "nvidia-cuda-nvcc" in locked("nvcc")


def test_defaults_and_labels_agree_with_the_package() -> None:
    assert defaults("VERSION") == {rwkv_cluster.__version__}
    assert defaults("TORCH_VERSION") == {locked("cuda")["torch"]}
    assert defaults("CUDA_ARCHITECTURES") == {" ".join(CUDA_ARCHITECTURES)}
    (cuda,) = defaults("CUDA_VERSION")
    assert locked("nvcc")["nvidia-cuda-nvcc"].startswith(f"{cuda}.")


def test_bases_have_digests() -> None:
    assert defaults("CUDA_IMAGE") == {"${BASE_IMAGE}"}
    (base,) = defaults("BASE_IMAGE")
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", base)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    known = {name for _, name in stages} | {"${BASE_IMAGE}", "${CUDA_IMAGE}"}
    assert {source for source, _ in stages} <= known


def test_the_last_stage_is_nobodys_root() -> None:
    runtime = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)", runtime, re.MULTILINE) == ["1000:1000"]
    assert "type=secret" not in runtime, "a layer of the image could keep it"
