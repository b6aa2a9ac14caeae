"""Which library is taken: none that is damaged, foreign, stale or for another GPU, each with its reason."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import build, loader
from rwkv_cluster.kernels.signatures import ABI


@pytest.fixture
def folder(cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that is looked in, with a whole library."""
    target = tmp_path / "lib"
    shutil.copytree(cpu_library.parent, target)
    monkeypatch.setattr(loader, "folders", lambda: [target])
    return target


def find_cpu() -> loader.Library | loader.Missing:
    return loader.cpu.__wrapped__()


def reason() -> str:
    found = find_cpu()
    assert isinstance(found, loader.Missing)
    said = re.fullmatch(r"No compiled .*the CPU: (.*)\. `python -m rwkv_cluster\.kernels\.build cpu` .*", found.reason)
    assert said, found.reason
    return said[1]


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "wkv_cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_library_is_taken(folder: Path) -> None:
    found = find_cpu()
    assert isinstance(found, loader.Library)
    assert found.path == folder / "libwkv_cpu.so"
    assert found.target in ("avx512", "avx2", "portable")


def test_the_installed_one_is_found() -> None:
    assert isinstance(loader.cpu(), loader.Library), "install the package again, or build: its sources have changed"


def test_the_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.FOLDER_VARIABLE, str(tmp_path))
    assert loader.folders()[0] == tmp_path
    assert loader.folders()[1] == build.PACKAGE_LIBRARIES


def test_without_a_home_directory_there_is_no_folder_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loader.FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert loader.folders() == [build.PACKAGE_LIBRARIES]


def test_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)
    assert reason() == f"{folder} has no wkv_cpu.json"


def test_no_library_beside_its_manifest(folder: Path) -> None:
    (folder / "libwkv_cpu.so").unlink()
    assert reason() == f"{folder} has no libwkv_cpu.so"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"manifest_version": 99}'])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "wkv_cpu.json").write_text(text)
    assert reason().startswith(f"{folder} cannot be read (")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_library_is_never_loaded(folder: Path, damage: str) -> None:
    path = folder / "libwkv_cpu.so"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    assert reason().startswith(f"{path} is not what")


def test_a_library_of_other_sources(folder: Path) -> None:
    change_manifest(folder, sources={"cpu/wkv.cpp": "0" * 64})
    assert reason().startswith(f"{folder}/libwkv_cpu.so was built from other")


def test_a_library_with_another_interface(folder: Path) -> None:
    change_manifest(folder, abi=99)
    assert reason() == f"{folder}/libwkv_cpu.so has interface {ABI} and 99, this package wants {ABI}"


def test_a_file_that_is_no_library(folder: Path) -> None:
    path = folder / "libwkv_cpu.so"
    path.write_bytes(b"not a library")
    change_manifest(folder, library={"sha256": build._sha256(path)})
    assert reason().startswith(f"{path} does not load (")


def place_cuda_library(folder: Path, **manifest) -> None:
    """A library of no bytes for sm_80 and sm_90, which is as its manifest says."""
    (folder / "libwkv_cuda.so").write_bytes(b"")
    content = {"manifest_version": 1, "abi": 1, "architectures": ["sm_80", "sm_90", "compute_120"],
               "sources": build.source_digests("cuda"),
               "library": {"sha256": build._sha256(folder / "libwkv_cuda.so")}}  # fmt: skip
    (folder / "wkv_cuda.json").write_text(json.dumps(content | manifest))


def test_a_gpu_that_no_library_fits_is_named_with_what_there_is_and_the_command(folder: Path) -> None:
    place_cuda_library(folder)
    found = loader.cuda.__wrapped__("Tesla V100", (7, 0))
    assert isinstance(found, loader.Missing)
    assert re.fullmatch(
        rf"No compiled .* Tesla V100 \(sm_70\): {re.escape(str(folder))}/libwkv_cuda\.so has sm_80 sm_90 compute_120\. "
        r"`python -m rwkv_cluster\.kernels\.build cuda --arch 70` .*",
        found.reason,
    )


@pytest.mark.parametrize("driver", [None, (12, 8), (13, 0), (14, 1)], ids=str)
def test_a_library_whose_cuda_the_driver_does_not_know(
    driver: tuple[int, int] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older minor version serves; a later major one would fail in the first launch."""
    place_cuda_library(folder, compiler="Cuda compilation tools, release 13.1, V13.1.80")
    monkeypatch.setattr(loader, "driver_version", lambda: driver)
    found = loader.cuda.__wrapped__("H100", (9, 0))
    assert isinstance(found, loader.Missing)
    too_new = "libwkv_cuda.so was built by CUDA 13.1, and the driver knows CUDA 12.8 and older. "
    assert (too_new if driver == (12, 8) else "libwkv_cuda.so does not load (") in found.reason


def test_without_a_driver_its_version_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert loader.driver_version.__wrapped__() is None


def test_a_gpu_s_error_may_be_of_an_earlier_call() -> None:
    handle = SimpleNamespace(rwkv_status_text=lambda status: f"status {status}".encode())
    library = loader.Library(handle, Path("lib.so"), "sm_90")
    library.check("rwkv_mix_forward", 0, "nothing")
    with pytest.raises(KernelError, match=r"rwkv_mix_forward of lib.so failed for a tensor: status 1$"):
        library.check("rwkv_mix_forward", 1, "a tensor")
    with pytest.raises(KernelError, match=r"status 1700\. It may be of an earlier call.*CUDA_LAUNCH_BLOCKING=1"):
        library.check("rwkv_mix_forward", 1700, "a tensor")


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100", (10, 0), True),
        ("sm_120", (10, 0), False),
        ("compute_90", (12, 1), True),
        ("compute_120", (9, 0), False),
        ("nonsense", (9, 0), False),
    ],
)
def test_what_code_runs_on_what(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert loader.runs_on(architecture, capability) is runs
