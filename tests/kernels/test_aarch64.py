"""The portable build on a processor that is not an x86: cross-compiled for aarch64, run by qemu, held to float64."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from naive_wkv import VERSIONS, naive, output_gradients, random_inputs, relative_errors, values_and_gradients
from torch import Tensor

from rwkv_cluster.kernels import build
from rwkv_cluster.kernels.native import IO

pytestmark = pytest.mark.system

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wkv_driver for aarch64, beside the library that it is linked with and the library's manifest."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        reason = f"no {' and no '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        library = build.build("cpu", folder)
    made, source = folder / "wkv_driver", Path(__file__).with_name("wkv_driver.cpp")
    options = ["-std=c++17", "-Wall", "-Werror", "-static-libstdc++", "-static-libgcc", f"-I{build.CSRC}"]
    command = [COMPILER, *options, str(source), str(library), f"-Wl,-rpath,{folder}", "-o", str(made)]
    subprocess.run(command, check=True, timeout=120)
    return made


def by_driver(driver: Path, version: str, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`naive_wkv.values_and_gradients` by the driver."""
    *tensors, state = inputs
    batch, time, heads, size = tensors[0].shape
    dy, dfinal = output_gradients(inputs)
    types = [torch.float32 if x.ndim == 2 else dtype for x in tensors]
    sent = [
        x.to(t)
        for x, t in zip([*tensors, state, dy, dfinal], [*types, torch.float32, dtype, torch.float32], strict=True)
    ]
    number = 7 if version == "wkv7" else 6
    header = struct.pack("<7q", number, batch, time, heads, size, IO[dtype], version == "wkv5")
    given, made = driver.with_name("inputs"), driver.with_name("outputs")
    given.write_bytes(header + b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in sent))
    made.unlink(missing_ok=True)
    command = [EMULATOR, "-L", LIBRARIES, str(driver), str(given), str(made)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "portable\n"), run.stderr
    content, row = bytearray(made.read_bytes()), (batch, heads, size)
    shapes = [tensors[0].shape, state.shape, *(row if x.ndim == 2 else x.shape for x in tensors), state.shape]
    found = []
    for shape, kind in zip(shapes, [dtype, torch.float32, *types, torch.float32], strict=True):
        count = torch.Size(shape).numel()
        found.append(torch.frombuffer(content, dtype=kind, count=count).view(shape))
        content = content[count * kind.itemsize :]
    assert not content
    return [*found[:2], *(g.sum(0) if g.ndim == 3 else g for g in found[2:-1]), found[-1]]


@pytest.mark.parametrize("shape", [(2, 33, 3, 64), (1, 77, 1, 20)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_and_every_gradient(driver: Path, version: str, shape: tuple[int, ...]) -> None:
    inputs = [x.float().double() for x in random_inputs(version, *shape)]
    wanted = values_and_gradients(partial(naive, version), inputs)
    errors = relative_errors(by_driver(driver, version, inputs, torch.float32), wanted)
    assert max(errors[:2]) < 1e-6
    assert max(errors[2:]) < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_rounds_only_inputs_and_outputs(driver: Path, version: str, dtype: torch.dtype) -> None:
    *inputs, state = random_inputs(version, 1, 37, 2, 64)
    inputs = [*(x.to(dtype if x.ndim == 4 else torch.float32).double() for x in inputs), state.float().double()]
    wanted = values_and_gradients(partial(naive, version), inputs)
    assert max(relative_errors(by_driver(driver, version, inputs, dtype), wanted)) < 2.5e-3


def test_the_manifest_names_the_machine_of_the_target(driver: Path) -> None:
    manifest = json.loads(driver.with_name("wkv_cpu.json").read_text())
    assert manifest["machine"] == "aarch64"
    assert "-mavx2" not in manifest["flags"]
