"""What counts as missing memory, and what a training says then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_cluster.bench import cuda_step
from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.errors import KernelError, KernelMemoryError, TrainingError
from rwkv_cluster.kernels import loader
from rwkv_cluster.train.memory.out_of_memory import is_out_of_memory, naming_remedy

CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
MISSING = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"),
    CUBLAS,
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    KernelMemoryError("wkv7_forward failed"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MISSING, ids=lambda error: type(error).__name__)
def test_missing_memory_has_many_names(error: Exception) -> None:
    assert is_out_of_memory(error)
    says = pytest.raises(TrainingError, match=r"not enough memory to train: .+\. Use training.grad_cp=1 or a ")
    with says as raised, naming_remedy(TrainingConfig(micro_bsz=4)):
        raise error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KernelError("no such kernel"), OSError(12, "memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, naming_remedy(TrainingConfig()):
        raise error
    assert raised.value is error


def test_where_nothing_smaller_is_left_the_rest_is_named() -> None:
    with (
        pytest.raises(TrainingError, match=r"training\.zero_stage"),
        naming_remedy(TrainingConfig(micro_bsz=1, grad_cp=1)),
    ):
        raise CUBLAS


@pytest.mark.parametrize(
    ("status", "kind"), [(1, KernelError), (4, KernelMemoryError), (1002, KernelMemoryError), (1001, KernelError)]
)
def test_a_librarys_status_says_that_memory_is_missing(status: int, kind: type[KernelError]) -> None:
    handle: Any = SimpleNamespace(rwkv_status_text=lambda status: b"text")
    with pytest.raises(KernelError, match=r"^call of x.so failed for a tensor: text") as caught:
        loader.Library(handle, Path("x.so"), "cuda").check("call", status, "a tensor")
    assert caught.type is kind


def test_a_benchmark_tries_fewer_layers_whatever_memory_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(n_layer: int, *others: object) -> dict[str, Any]:
        if n_layer > 2:
            raise CUBLAS
        return {"n_layer": n_layer}

    monkeypatch.setattr(cuda_step, "_measure", measure)
    assert cuda_step._fitting(8, 64, 1, 0, cuda_step.argparse.Namespace()) == {"n_layer": 2}
