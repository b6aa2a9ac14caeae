"""Every barrier of the CUDA kernels is needed, and a test notices when one is gone: each is deleted in turn.

A mutant is built for the host shim and runs problems whose right results are known, under several schedules. A deadlock
or a crash counts as noticed, so it runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_cluster.kernels import build

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
BARRIER = re.compile(r"__sync(threads|warp)\(\);")
FILES = (
    *("wkv7_exact.cu", "wkv6_exact.cu", "wkv6_chunk.cu"),
    *("wkv7_chunk.cu", "wkv7_chunk32.cu", "wkv7_chunk32_backward.cu"),
    *("loss.cu", "rows.cuh", "norm_mix.cu", "rwkv7_passes.cu"),
)

IMPLIED = {
    # Between what a warp stores and loads there, its lanes meet at another ldmatrix anyway. On a GPU that orders
    # nothing in memory, so that the barrier is needed.
    ("wkv7_chunk.cu", "warp"),
}


def barriers() -> list[tuple[str, int, str]]:
    """File, place in it, and kind of every barrier."""
    found = []
    for name in FILES:
        text = (build.CSRC / "cuda" / name).read_text()
        found += [(name, match.start(), match[1]) for match in BARRIER.finditer(text)]
    return found


RUNNER = """
import sys
from functools import partial
from pathlib import Path
import torch
import naive_wkv
from host_kernels import EXACT, TENSOR_CORES, TENSOR_CORES_16, values_and_gradients
from rwkv_cluster.kernels import loader

library = loader.open_library(Path(sys.argv[1]))
version, kernel = sys.argv[2], {"exact": EXACT, "chunk": TENSOR_CORES_16, "chunk32": TENSOR_CORES}[sys.argv[3]]
dtype = torch.float32 if kernel == EXACT else torch.bfloat16
worst = 0.0
for seed in range(9):
    library.rwkv_host_schedule(seed)
    inputs = naive_wkv.random_inputs(version, 1, 50, 2, 64, seed=seed)
    decay = 1 if version == "wkv7" else 3
    if seed % 2:
        inputs[decay] = inputs[decay] - 5  # slow: what goes wrong early is still seen late
    inputs = [x.to(dtype if x.ndim == 4 and i + 1 < len(inputs) else torch.float32).double()
              for i, x in enumerate(inputs)]
    wanted = naive_wkv.values_and_gradients(partial(naive_wkv.naive, version), inputs)
    found = values_and_gradients(library, version, inputs, dtype, kernel=kernel)
    worst = max(worst, *naive_wkv.relative_errors(found, wanted))
sys.exit(0 if worst < (5e-5 if kernel == EXACT else 6e-3) else 9)
"""

LOSS_RUNNER = """
import sys
from pathlib import Path
import torch
from rwkv_cluster.kernels import loader, softmax_loss

path = Path(sys.argv[1])
library = loader.Library(loader.open_library(path), path, "host")
worst = 0.0
for seed in range(9):
    library.handle.rwkv_host_schedule(seed)
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(seed))
    targets = torch.tensor([7, 1500, 2999])
    wanted = torch.softmax(logits.double(), -1)
    wanted[range(3), logits.argmax(-1)] += 0.1 * logits.double().amax(-1)
    wanted[range(3), targets] -= 1
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    found = softmax_loss.softmax_loss(library, logits, targets, 0.1, gradient=True)
    errors = torch.cat([(logits - wanted).flatten(), (found - expected)[None] / expected]).abs()
    worst = max(worst, errors.nan_to_num(nan=9.0).max().item())
sys.exit(0 if worst < 2e-6 else 9)
"""

FUSED_RUNNER = """
import sys
from pathlib import Path
import torch
from fused_passes import LIMITS, NATIVE, errors_of
from rwkv_cluster.kernels import loader

path = Path(sys.argv[1])
library = loader.Library(loader.open_library(path), path, "host")
loader.cpu = lambda: library
worst = 0.0
for seed in range(5):
    library.handle.rwkv_host_schedule(seed)
    for name in NATIVE:
        worst = max(worst, *errors_of(name, (1, 60, 9, 32), torch.float32))
sys.exit(0 if worst < LIMITS[torch.float32] else 9)
"""

OTHER_RUNNERS = {
    "loss.cu": LOSS_RUNNER,
    **dict.fromkeys(("rows.cuh", "norm_mix.cu", "rwkv7_passes.cu"), FUSED_RUNNER),
}


def passes(library: Path, file: str) -> bool:
    runner, *names = (OTHER_RUNNERS[file],) if file in OTHER_RUNNERS else (RUNNER, *Path(file).stem.split("_"))
    arguments = [sys.executable, "-c", runner, str(library), *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, timeout=120).returncode == 0


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants") / "csrc"
    shutil.copytree(build.CSRC, folder)
    return folder


def test_nothing_is_wrong_with_the_sources_as_they_are(sources: Path, tmp_path: Path) -> None:
    library = build.build("host", tmp_path, csrc=sources)
    assert all(passes(library, file) for file in FILES)


@pytest.mark.parametrize(("file", "place", "kind"), barriers())
def test_a_missing_barrier_is_noticed(file: str, place: int, kind: str, sources: Path, tmp_path: Path) -> None:
    if (file, kind) in IMPLIED:
        pytest.skip("implied by a matrix product under the shim; needed on a GPU")
    path = sources / "cuda" / file
    whole = path.read_text()
    try:
        path.write_text(whole[:place] + BARRIER.sub(";", whole[place:], count=1))
        library = build.build("host", tmp_path, csrc=sources)
    finally:
        path.write_text(whole)
    assert not passes(library, file)
