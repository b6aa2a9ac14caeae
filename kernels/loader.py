"""Find the prebuilt library that fits, or say why there is none. Nothing is compiled here, and torch is not needed.

A library is used when its manifest is there, its bytes are those of the manifest, it was built from the sources that
are installed, its interface is `signatures.ABI`, and, for CUDA, it holds code for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.errors import KernelError, KernelMemoryError
from rwkv_cluster.kernels import build
from rwkv_cluster.kernels.signatures import ABI, CUDA_ERROR, NO_MEMORY, ONLY_SOME, SIGNATURES

FOLDER_VARIABLE = "RWKV_CLUSTER_KERNELS"
COMMAND = "python -m rwkv_cluster.kernels.build"


@dataclass(frozen=True)
class Library:
    """A loaded library. target: what it runs, "avx512" or "sm_80 sm_90 compute_120"."""

    handle: ctypes.CDLL
    path: Path
    target: str

    def check(self, name: str, status: int, inputs: str) -> None:
        """Raise an error unless the function `name` has returned 0. inputs: what it was given, in words.

        Raises:
            KernelMemoryError: it has found no memory.
            KernelError: it reports another error.
        """
        if not status:
            return
        reason = self.handle.rwkv_status_text(status).decode()
        blocking = "It may be of an earlier call, as a GPU works behind: CUDA_LAUNCH_BLOCKING=1 tells which"
        remedy = blocking if status >= CUDA_ERROR else ""
        kind = KernelMemoryError if status in NO_MEMORY else KernelError
        raise kind(f"{name} of {self.path} failed for {inputs}: {reason}", remedy=remedy)


@dataclass(frozen=True)
class Missing:
    """No library that fits. what: what was looked for. remedy: the command that helps."""

    what: str
    remedy: str = ""

    @property
    def reason(self) -> str:
        """Both as whole sentences."""
        return "".join(f"{part}. " for part in (self.what, self.remedy) if part).rstrip()


@functools.cache
def cpu() -> Library | Missing:
    """The CPU library of this installation."""
    faults: list[str] = []
    for path, manifest in _candidates("cpu", faults):
        library = _load(path, manifest, faults)
        if library is not None:
            return Library(library, path, library.rwkv_kernels_target().decode())
    return Missing(f"No compiled WKV kernels for the CPU: {_listed(faults)}", f"`{COMMAND} cpu` builds them")


@functools.cache
def cuda(name: str, capability: tuple[int, int]) -> Library | Missing:
    """The CUDA library that holds code for a GPU.

    Args:
        name: the GPU's, for the message.
        capability: its compute capability, e.g. (9, 0).
    """
    faults: list[str] = []
    for path, manifest in _candidates("cuda", faults):
        architectures = [str(arch) for arch in manifest.get("architectures", [])]
        if not any(runs_on(arch, capability) for arch in architectures):
            faults.append(f"{path} has {' '.join(architectures) or 'no architecture'}")
            continue
        if fault := _too_new(manifest, driver_version()):
            faults.append(f"{path} {fault}")
            continue
        library = _load(path, manifest, faults)
        if library is not None:
            return Library(library, path, " ".join(architectures))
    arch = "".join(map(str, capability))
    what = f"No compiled WKV kernels for {name} (sm_{arch}): {_listed(faults)}"
    return Missing(what, f"`{COMMAND} cuda --arch {arch}` builds them")


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for "sm_86" or PTX "compute_120" runs on a GPU: binaries on later minors of a major, PTX on all."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
    if match is None:
        return False
    kind, major, minor = match[1], int(match[2]), int(match[3])
    if kind == "compute":
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver knows, e.g. (13, 0); None without one."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else (version.value // 1000, version.value % 1000 // 10)


def _too_new(manifest: dict[str, Any], driver: tuple[int, int] | None) -> str:
    """What is wrong with a library whose CUDA has a later major version than the driver; empty where nothing is."""
    release = re.search(r"release (\d+)\.(\d+)", str(manifest.get("compiler")))
    if driver is None or release is None or int(release[1]) <= driver[0]:
        return ""
    return f"was built by CUDA {release[1]}.{release[2]}, and the driver knows CUDA {driver[0]}.{driver[1]} and older"


def folders() -> list[Path]:
    """Folders in which libraries are looked for, in this order."""
    named = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(named) if named else None, build.PACKAGE_LIBRARIES, build.user_libraries()]
    return [folder for folder in folders if folder is not None]


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions' types. Raises OSError or AttributeError where it is another."""
    handle = ctypes.CDLL(str(path))
    for name, (result, arguments) in (SIGNATURES | ONLY_SOME).items():
        if name in SIGNATURES or hasattr(handle, name):
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
    return handle


def _candidates(target: str, faults: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Libraries that are whole and of the installed sources; what is wrong with others goes to `faults`."""
    sources = build.source_digests(target)
    for folder in folders():
        path = folder / build.library_name(target)
        try:
            manifest = build.manifest(folder, target)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            faults.append(f"{folder} has no {missing}")
        except (OSError, ValueError) as error:
            faults.append(f"{folder} cannot be read ({error})")
        else:
            if digest != manifest.get("library", {}).get("sha256"):
                faults.append(f"{path} is not what its manifest says")
            elif manifest.get("sources") != sources:
                faults.append(f"{path} was built from other sources than those installed")
            else:
                yield path, manifest


def _load(path: Path, manifest: dict[str, Any], faults: list[str]) -> ctypes.CDLL | None:
    try:
        library = open_library(path)
        abis = {int(manifest["abi"]), int(library.rwkv_kernels_abi())}
    except (OSError, AttributeError, KeyError, ValueError) as error:
        faults.append(f"{path} does not load ({error})")
        return None
    if abis != {ABI}:
        faults.append(f"{path} has interface {' and '.join(map(str, sorted(abis)))}, this package wants {ABI}")
        return None
    return library


def _listed(faults: list[str]) -> str:
    return "; ".join(faults)
