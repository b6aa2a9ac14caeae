"""Freed tensors' memory is used again, not cleared anew by the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from rwkv_cluster.runtime.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    before = faults()
    tensors = [torch.ones(1 << 26, dtype=torch.uint8) for _ in range(2)]  # beyond glibc's own limit of 32 MiB
    tensors.clear()
    last = faults() - before
print(last)
"""


def _page_faults(choice: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_there_for_the_next_step() -> None:
    assert _page_faults("kept") < 100 < _page_faults("returned")
