"""nvcc compiles every kernel for every architecture, within its registers and without spilling any."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build

pytestmark = pytest.mark.system

EXACT_FORWARD = {32: 96, 64: 128, 128: 255}
EXACT_BACKWARD = {32: 168, 64: 255, 128: 255}
EXACT_FORWARD_OF_32_ON_SM_86 = 128
"""One warp a block: sm_86 has at most 16 blocks on an SM, and has registers for them; others for 21 with 96."""

REGISTERS = {
    **{(f"wkv{version}_exact", "forward", size): most for version in (6, 7) for size, most in EXACT_FORWARD.items()},
    **{(f"wkv{version}_exact", "backward", size): most for version in (6, 7) for size, most in EXACT_BACKWARD.items()},
    ("wkv7_chunk", "forward", None): 168,
    ("wkv7_chunk", "backward", None): 255,
    ("wkv7_chunk32", "forward", None): 128,
    ("wkv7_chunk32_backward", "backward", None): 255,
    ("wkv6_chunk", "forward", None): 168,
    ("wkv6_chunk", "backward", None): 255,
    ("fused", "forward", None): 128,
    ("fused", "backward", None): 232,
    ("rwkv6_passes", "forward", None): 168,
    ("rwkv6_passes", "backward", None): 255,
    ("rwkv7_passes", "forward", None): 128,
    ("rwkv7_passes", "backward", None): 168,
    ("norm_mix", "forward", None): 168,
    ("norm_mix", "backward", None): 168,
    ("loss", "forward", None): 64,
}
"""Budgets by file, direction and head size, where that is a parameter of the kernel.

Two warps a block and 255 registers leave room for four blocks on an SM, four warps and 128 too, 168 for three,
255 for two. The loss does both directions in one: 16 warps a block, of which two have room. The widest norms have 10
warps, for which 168 are all.
"""

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiler() -> str:
    try:
        return build.cuda_compiler().command
    except build.BuildError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("architectures", [["90"], pytest.param([*build.CUDA_ARCHITECTURES], marks=pytest.mark.slow)])
def test_registers_and_spills(architectures: list[str], compiler: str, tmp_path: Path) -> None:
    def report(source: str) -> str:
        flags = [*build.CUDA_FLAGS.split(), *build._gencode(architectures).split(), "-Xptxas", "-v"]
        command = [compiler, *flags, "-c", str(build.CSRC / "cuda" / source), "-o", str(tmp_path / f"{source}.o")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        return run.stderr

    sources = [f"{name}.cu" for name in sorted({file for file, *_ in REGISTERS})]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = dict(zip(sources, pool.map(report, sources), strict=True))
    seen = set()
    for source, text in reports.items():
        for match in KERNEL.finditer(text):
            assert "rwkv" in match["name"]  # what compute-sanitizer's filter in test_cuda_device.py goes by
            size = re.search(r"wardILi(\d+)E", match["name"])
            direction = "backward" if "backward" in match["name"] else "forward"
            kernel = (Path(source).stem, direction, int(size[1]) if size else None)
            seen.add((*kernel, match["architecture"]))
            assert (match["stores"], match["loads"]) == ("0", "0"), (kernel, match["architecture"])
            most = REGISTERS[kernel]
            if (most, match["architecture"]) == (EXACT_FORWARD[32], "sm_86"):
                most = EXACT_FORWARD_OF_32_ON_SM_86
            assert int(match["registers"]) <= most, (kernel, match["architecture"], match["registers"])
    wanted = {(*kernel, f"sm_{architecture}") for kernel in REGISTERS for architecture in architectures}
    assert wanted <= seen


@pytest.mark.parametrize("source", ["wkv7_chunk.cu", "wkv7_chunk32.cu", "wkv7_chunk32_backward.cu", "wkv6_chunk.cu"])
def test_kernels_on_tensor_cores_divide_and_exponentiate_in_single_instructions(
    compiler: str, source: str, tmp_path: Path
) -> None:
    """An IEEE division is a call in a branch, one for each warp that needs its slow path: 40 a chunk of RWKV-7's."""
    ptx = tmp_path / "code.ptx"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-ptx", "-o", str(ptx)]
    subprocess.run([compiler, *flags, str(build.CSRC / "cuda" / source)], check=True, timeout=300)
    text = ptx.read_text()
    assert not re.findall(r"\b(?:div|rcp|sqrt)\.rn\S*", text)
    assert "ex2.approx.ftz.f32" in text


@pytest.mark.parametrize(
    ("source", "others"),
    [
        ("fused.cu", {"ld.global.u8", "st.global.f32"}),
        ("norm_mix.cu", {"ld.global.u8", "ld.global.f32", "st.global.f32"}),
        ("rwkv6_passes.cu", {"ld.global.u8", "st.global.f32"}),
        ("rwkv7_passes.cu", {"ld.global.f32", "st.global.f32"}),
    ],
)
def test_the_fused_passes_move_16_bytes_at_a_time(source: str, others: set[str], compiler: str, tmp_path: Path) -> None:
    """But for the bytes of starts, what there is one of a head, and partial sums."""
    ptx = tmp_path / "code.ptx"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-ptx", "-o", str(ptx)]
    subprocess.run([compiler, *flags, str(build.CSRC / "cuda" / source)], check=True, timeout=300)
    moved = set(re.findall(r"\b(?:ld|st)\.global\.[a-z0-9.]+", ptx.read_text()))
    assert moved - others == {f"{way}.global.v4.{kind}" for way in ("ld", "st") for kind in ("f32", "u32")}


@pytest.fixture(scope="module")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one architecture."""
    return build.build("cuda", tmp_path_factory.mktemp("library"), architectures=["90"])


def test_the_whole_library_links(library: Path) -> None:
    exported = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in exported.stdout.splitlines() if line.split()[-1].startswith("rwkv")}
    assert names == {
        "rwkv_kernels_abi", "rwkv_kernels_target", "rwkv_status_text", "rwkv_saved_bytes", "rwkv_wkv7_forward",
        "rwkv_wkv7_backward", "rwkv_wkv6_forward", "rwkv_wkv6_backward", "rwkv_softmax_loss",
        *(f"rwkv_{name}_{way}"
          for name in (
              "mix", "norm_mix", "shift_blend", "squared_relu", "sigmoid_gate", "prepare", "read", "gated_norm")
          for way in ("forward", "backward")),
    }  # fmt: skip
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libtorch" not in needed


@pytest.mark.slow
def test_the_same_folder_gives_the_same_bytes(library: Path) -> None:
    before = library.read_bytes()
    assert build.build("cuda", library.parent, architectures=["90"]).read_bytes() == before


@pytest.mark.parametrize("architectures", [["90"], pytest.param(["80", "90"], marks=pytest.mark.slow)])
def test_the_manifest_lists_what_is_in_the_library(architectures: list[str], library: Path, tmp_path: Path) -> None:
    folder = library.parent
    if architectures != ["90"]:
        folder = build.build("cuda", tmp_path, architectures=architectures).parent
    wanted = [f"sm_{architecture}" for architecture in architectures]
    assert build.manifest(folder, "cuda")["architectures"] == [*wanted, "compute_90"]
