"""csrc -> a library per target, with a manifest that says from what: `python -m rwkv_cluster.kernels.build`.

Targets: `cpu` (C++17 compiler, every instruction set in one library), `cuda` (nvcc, every architecture in one library),
`host` (the CUDA sources run on a CPU, for tests). The installation builds `cpu`; nothing is built at import or start.
Only the standard library is used, because pip runs this file in a bare environment.

A library is written under a temporary name and renamed, its manifest after it: a build that was killed leaves nothing
that the loader takes. Same sources, compiler and flags give the same bytes; those of nvcc in the same folder only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

CSRC = Path(__file__).parent / "csrc"
PACKAGE_LIBRARIES = Path(__file__).parent / "lib"
MANIFEST_VERSION = 1
TARGETS = ("cpu", "cuda", "host")

CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
CUDA_SOURCES = (
    "wkv7_exact.cu",
    "wkv6_exact.cu",
    "wkv7_chunk.cu",
    "wkv7_chunk32.cu",
    "wkv7_chunk32_backward.cu",
    "wkv6_chunk.cu",
    "fused.cu",
    "norm_mix.cu",
    "rwkv6_passes.cu",
    "rwkv7_passes.cu",
    "loss.cu",
    "capi.cu",
)
CPU_SOURCES = ("capi.cpp",)
CPU_TARGET_SOURCES = ("wkv.cpp", "fused.cpp", "rwkv6_passes.cpp")
X86_TARGETS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c",
}
CPU_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno -ffp-contract=fast -pthread "
    "-Wall -Wno-psabi -Wno-maybe-uninitialized"
)
HOST_FLAGS = "-std=c++17 -O2 -g0 -fPIC -fvisibility=hidden -pthread -Wall -Wno-unknown-pragmas -DRWKV_HOST_SHIM -x c++"
CUDA_FLAGS = "-std=c++17 -O3 -cudart static -Xcompiler -fPIC,-fvisibility=hidden"
LINK_FLAGS = "-shared -static-libstdc++ -static-libgcc -pthread -Wl,--build-id=none"


Report = Callable[[int, int], None]
SILENT_S = 5.0


class BuildError(RuntimeError):
    """No compiler, or one that refused the sources. The message is for the person at the terminal."""


@dataclass(frozen=True)
class Compiler:
    """A compiler. version: the first line that names it; machine: what its code runs on, e.g. "aarch64"."""

    command: str
    version: str
    machine: str


def library_name(target: str) -> str:
    return f"libwkv_{target}.so"


def manifest_name(target: str) -> str:
    return f"wkv_{target}.json"


def user_libraries() -> Path | None:
    """Folder of a user's own builds, for when the package's folder cannot be written. None without a home directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "rwkv_cluster" / "kernels" if os.path.isabs(cache) else None


def source_digests(target: str, csrc: Path = CSRC) -> dict[str, str]:
    """sha256 of every source of the target, headers included, by path below csrc."""
    folders = {"cpu": ("cpu",), "cuda": ("cuda",), "host": ("cuda", "host")}[target]
    files = [*csrc.glob("*.h"), *(path for folder in folders for path in (csrc / folder).iterdir() if path.is_file())]
    return {path.relative_to(csrc).as_posix(): _sha256(path) for path in sorted(files)}


def build(
    target: str,
    output: Path,
    *,
    architectures: Sequence[str] = CUDA_ARCHITECTURES,
    jobs: int | None = None,
    csrc: Path = CSRC,
    report: Report | None = None,
) -> Path:
    """Compile `target` and place the library and its manifest in `output`.

    Args:
        target: "cpu", "cuda" or "host".
        output: folder, made where missing.
        architectures: of "cuda", e.g. "90"; PTX of the newest is added.
        jobs: compilers at a time; default: the cores.
        csrc: the sources.
        report: called with the number of files that are made, and of all of them, whenever one is.

    Returns:
        Path of the library.

    Raises:
        BuildError: no compiler, or it refused the sources.
    """
    output.mkdir(parents=True, exist_ok=True)
    compiler = cuda_compiler() if target == "cuda" else cpp_compiler()
    with _build_folder(output, target) as folder:
        shutil.copytree(csrc, folder / "csrc")  # relative paths: no place of this machine gets into the objects
        flags = _write_ninja(target, folder, compiler, architectures)
        _run_ninja(folder, jobs, report)
        library = folder / library_name(target)
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "abi": _abi(csrc),
            "target": target,
            "machine": compiler.machine,
            "architectures": _architecture_names(architectures) if target == "cuda" else [],
            "compiler": compiler.version,
            "flags": flags,
            "sources": source_digests(target, csrc),
            "library": {"name": library.name, "sha256": _sha256(library), "bytes": library.stat().st_size},
        }
        described = folder / manifest_name(target)
        described.write_text(json.dumps(manifest, indent=2) + "\n")
        for file in (library, described):
            _commit(file, output / file.name)
    return output / library_name(target)


@contextlib.contextmanager
def _build_folder(output: Path, target: str) -> Iterator[Path]:
    """An empty folder, gone afterwards. nvcc writes its name into the library, so that each build has the same one.

    Two builds take turns; the kernel frees the lock of one that was killed.
    """
    folder, lock = output / f".build-{target}", output / f".build-{target}.lock"
    with contextlib.ExitStack() as stack:
        while True:
            handle = stack.enter_context(open(lock, "w"))
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # removed by the build that had it
                if os.path.samestat(lock.stat(), os.fstat(handle.fileno())):
                    break
        stack.callback(lock.unlink)
        shutil.rmtree(folder, ignore_errors=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "kept").mkdir(parents=True)
        yield folder


def cpp_compiler() -> Compiler:
    """$CXX, else the first C++ compiler on PATH. Raises BuildError."""
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if path := shutil.which(command):
            return Compiler(path, _version(path), _machine(path))
    looked_for = f"CXX={chosen}" if chosen else "c++, g++ or clang++ on PATH"
    raise BuildError(f"no C++ compiler: looked for {looked_for}. Install one, e.g. `apt-get install g++`")


def cuda_compiler() -> Compiler:
    """nvcc of $CUDA_HOME, else of PATH or /usr/local/cuda. Raises BuildError."""
    home = os.environ.get("CUDA_HOME")
    for command in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if path := shutil.which(command):
            return Compiler(path, _version(path), platform.machine())
    looked_for = f"CUDA_HOME={home}" if home else "CUDA_HOME, PATH and /usr/local/cuda"
    raise BuildError(f"no nvcc: looked in {looked_for}. Install the CUDA toolkit, 12.8 or newer")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkv_cluster.kernels.build", description="Build the WKV kernels.")
    parser.add_argument("targets", nargs="*", metavar="{cpu,cuda,host}", help="default: cpu, and cuda where nvcc is")
    parser.add_argument("--arch", nargs="+", default=list(CUDA_ARCHITECTURES), help="CUDA architectures, e.g. 80 90")
    parser.add_argument("--output", type=Path, help="folder; default: the package's, else the user's cache")
    parser.add_argument("--jobs", type=int, help="compilers at a time; default: the cores")
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; targets: {', '.join(TARGETS)}")
    try:
        for target in options.targets or _default_targets():
            started = time.monotonic()
            path = build(
                target,
                options.output or _default_output(),
                architectures=options.arch,
                jobs=options.jobs,
                report=partial(_tell, target, started),
            )
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.0f} s")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    return 0


def _tell(target: str, started: float, done: int, total: int) -> None:
    """Say on stderr how far a build has come; `started` is of time.monotonic. One of a few seconds says nothing."""
    passed = time.monotonic() - started
    if passed > SILENT_S and done < total:
        left = round(passed / done * (total - done))
        print(f"{target}: {done} of {total} files, {left // 60}:{left % 60:02d} left", file=sys.stderr, flush=True)


def _default_targets() -> list[str]:
    with contextlib.suppress(BuildError):
        cuda_compiler()
        return ["cpu", "cuda"]
    return ["cpu"]


def _default_output() -> Path:
    folder = PACKAGE_LIBRARIES if PACKAGE_LIBRARIES.exists() else PACKAGE_LIBRARIES.parent
    if os.access(folder, os.W_OK):
        return PACKAGE_LIBRARIES
    if (output := user_libraries()) is None:
        raise BuildError(f"{folder} cannot be written, and there is no home directory. Name a folder with --output")
    return output


def _architecture_names(architectures: Sequence[str]) -> list[str]:
    newest = max(architectures, key=int)
    return [*(f"sm_{arch}" for arch in architectures), f"compute_{newest}"]


def _gencode(architectures: Sequence[str]) -> str:
    newest = max(architectures, key=int)
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return " ".join([*flags, f"-gencode arch=compute_{newest},code=compute_{newest}"])


def _write_ninja(target: str, folder: Path, compiler: Compiler, architectures: Sequence[str]) -> str:
    """Write build.ninja beside csrc; returns the flags in one line."""
    steps = list(_cpu_steps(compiler.machine) if target == "cpu" else _cuda_steps(folder / "csrc", target))
    if target == "cuda":
        flags = f"{CUDA_FLAGS} {_gencode(architectures)}"
        # Names of nvcc's own intermediate files get into the object; without -keep they hold its process id.
        compile_line = f"$compiler {flags} -keep -keep-dir kept $extra -c $in -o $out"
        link_line = (
            "$compiler -keep -keep-dir kept -shared -cudart static -Xlinker --build-id=none "
            "-Xcompiler -static-libstdc++ $in -o $out"
        )
    else:
        flags = CPU_FLAGS if target == "cpu" else HOST_FLAGS
        compile_line = f"$compiler {flags} $extra -c $in -o $out"
        link_line = f"$compiler $in -o $out {LINK_FLAGS}"
    lines = [
        f"compiler = {shlex.quote(compiler.command).replace('$', '$$')}",
        f"rule compile\n  command = {compile_line}\n  description = $out",
        f"rule link\n  command = {link_line}\n  description = $out",
        *(f"build {name}: compile csrc/{source}\n  extra = {extra}" for source, name, extra in steps),
        f"build {library_name(target)}: link {' '.join(name for _, name, _ in steps)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return " ".join([flags, *sorted({extra for _, _, extra in steps if extra})])


def _cpu_steps(machine: str) -> Iterator[tuple[str, str, str]]:
    """Source below csrc, object and extra flags of each compilation."""
    is_x86 = machine in ("x86_64", "AMD64")
    targets = (X86_TARGETS if is_x86 else {}) | {"portable": ""}
    common = f"-DRWKV_HAS_X86_TARGETS={int(is_x86)}"
    for source in CPU_SOURCES:
        yield f"cpu/{source}", f"{Path(source).stem}.o", common
    for source in CPU_TARGET_SOURCES:
        for name, flags in targets.items():
            extra = f"{common} -DRWKV_TARGET={name} {flags}".strip()
            yield f"cpu/{source}", f"{Path(source).stem}_{name}.o", extra


def _cuda_steps(csrc: Path, target: str) -> Iterator[tuple[str, str, str]]:
    for source in CUDA_SOURCES:
        yield f"cuda/{source}", f"{Path(source).stem}.o", ""
    if target == "host":
        for path in sorted((csrc / "host").glob("*.cpp")):
            yield f"host/{path.name}", f"host_{path.stem}.o", ""


def _run_ninja(folder: Path, jobs: int | None, report: Report | None) -> None:
    command = [_ninja(), "-C", str(folder), *([f"-j{jobs}"] if jobs else [])]
    environment = os.environ | {"NINJA_STATUS": "%f of %t: "}
    said = []  # beside the status
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as run:
        assert run.stdout is not None
        for line in map(str.rstrip, run.stdout):
            if status := re.match(r"(\d+) of (\d+): ", line):
                if report is not None:
                    report(int(status[1]), int(status[2]))
            elif line and not line.startswith("ninja: Entering"):
                said.append(line)
    if run.returncode:
        first = next((i for i, line in enumerate(said) if "error" in line.lower()), 0)  # warnings may come before it
        raise BuildError("the compiler refused the sources:\n  " + "\n  ".join(said[first : first + 12]))


def _ninja() -> str:
    """The ninja of the Python package of that name, else of PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        for name in ("ninja", "ninja.exe"):
            if (path := Path(ninja.BIN_DIR) / name).exists():
                return str(path)
    if path_found := shutil.which("ninja"):
        return path_found
    raise BuildError("no ninja: install it, `pip install ninja`")


def _version(command: str) -> str:
    run = subprocess.run([command, "--version"], capture_output=True, text=True)
    lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    named = [line for line in lines if "release" in line]  # nvcc says it below its name
    return (named or lines or ["unknown"])[0]


def _machine(command: str) -> str:
    """The first part of the compiler's target, "x86_64" of x86_64-linux-gnu: a cross compiler's is not this machine."""
    run = subprocess.run([command, "-dumpmachine"], capture_output=True, text=True)
    return run.stdout.strip().split("-")[0] or platform.machine()


def _abi(csrc: Path) -> int:
    lines = (csrc / "wkv.h").read_text().splitlines()
    return int(next(line.split()[2] for line in lines if line.startswith("#define RWKV_KERNELS_ABI ")))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _commit(written: Path, final: Path) -> None:
    """Move a finished file into place, on the disk before it has its name."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(written, final)


def manifest(folder: Path, target: str) -> dict[str, Any]:
    """The manifest of a target in `folder`. Raises OSError or ValueError when there is none that can be read."""
    content = json.loads((folder / manifest_name(target)).read_text())
    if not isinstance(content, dict) or content.get("manifest_version") != MANIFEST_VERSION:
        raise ValueError(f"{manifest_name(target)} is not a manifest of version {MANIFEST_VERSION}")
    return content


if __name__ == "__main__":
    sys.exit(main())
