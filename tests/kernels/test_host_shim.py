"""The host shim notices what would be wrong on a GPU alone: each fault in a kernel and a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build

pytestmark = pytest.mark.system

PROGRAM = """
#include <stdio.h>
#include <stdlib.h>

#include "cuda/fragments.cuh"

using namespace rwkv;

__global__ void write_behind(int bytes) {
    if (threadIdx.x == 31) dynamic_memory<char>()[bytes] = 1;
}

// Each lane stores a row that others read; `value` must arrive in all of them.
__global__ void pass_on(bool has_barrier, int shift, int *wrong) {
    bf16 *rows = dynamic_memory<bf16>();
    for (int i = 0; i < 8; ++i) rows[threadIdx.x * 8 + i] = to_bf16(1.0f);
    if (has_barrier) __syncwarp();
    uint32_t found[4];
    ldmatrix(found, rows + (threadIdx.x + 1) % 32 * 8 + shift);
    for (uint32_t pair : found) wrong[0] += pair != 0x3f803f80u;
}

__global__ void nothing() {}

int main(int, char **arguments) {
    const int which = atoi(arguments[1]);
    int wrong = 0;
    shim::schedule = 1;
    const auto run = [&](bool has_barrier, int shift) {
        return launch(pass_on, dim3(1), dim3(32), 1024, nullptr, has_barrier, shift, &wrong);
    };
    int32_t status = 0;
    switch (which) {
        case 0: status = launch(write_behind, dim3(1), dim3(32), 64, nullptr, 63); break;
        case 1: status = launch(write_behind, dim3(1), dim3(32), 64, nullptr, 64); break;
        case 2: status = run(true, 0); break;
        case 3: status = run(false, 0); break;
        case 4: status = run(true, 2); break;
        case 5: status = launch(nothing, dim3(1), dim3(32), MOST_SHARED_BYTES, nullptr); break;
        case 6: status = launch(nothing, dim3(1), dim3(32), MOST_SHARED_BYTES + 1, nullptr); break;
        case 7: status = launch(nothing, dim3(0), dim3(32), 0, nullptr); break;
        case 8: status = launch(nothing, dim3(1), dim3(1025), 0, nullptr); break;
        case 9: status = launch(nothing, dim3(1, 65536), dim3(32), 0, nullptr); break;
    }
    printf("%d %d", status, wrong > 0);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "program.cpp").write_text(PROGRAM)
    flags = [*build.HOST_FLAGS.split(), "-I", str(build.CSRC)]
    sources = [str(folder / "program.cpp"), str(build.CSRC / "host" / "switch.cpp")]
    subprocess.run([build.cpp_compiler().command, *flags, *sources, "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        pytest.param(0, "0 0", id="the last byte of dynamic memory"),
        pytest.param(1, "behind the dynamic shared memory", id="the byte behind it"),
        pytest.param(2, "0 0", id="a barrier before ldmatrix"),
        pytest.param(3, "0 1", id="no barrier before ldmatrix"),
        pytest.param(4, "ldmatrix that is not aligned", id="a row that is not aligned"),
        pytest.param(5, "0 0", id="as much shared memory as every GPU has"),
        pytest.param(6, "1001 0", id="too much shared memory"),
        pytest.param(7, "1009 0", id="no blocks"),
        pytest.param(8, "1009 0", id="too many threads"),
        pytest.param(9, "1009 0", id="too many rows of blocks"),
    ],
)
def test_what_a_gpu_would_not_do(case: int, wanted: str, program: Path) -> None:
    run = subprocess.run([program, str(case)], capture_output=True, text=True)
    assert wanted in run.stdout + run.stderr
    assert (run.returncode == 0) == (run.stdout != "")
