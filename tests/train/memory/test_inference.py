"""The precision in which a model is read and sampled: fp32 where it fits, on a CPU always."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from rwkv_cluster.train.memory.inference import inference_dtype

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = 512


def _weights(n_elements: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model of 4,096 channels, without values."""
    shapes = {"emb.weight": (65_536, 4096), "rest": (int(n_elements) - 65_536 * 4096,)}
    small = {"blocks.0.att.k_k": torch.empty(4096, device="meta")}
    return small | {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def _gpu(monkeypatch: pytest.MonkeyPatch, free: float, *, has_bf16: bool = True, kept: float = 0) -> None:
    stand_ins = {
        "mem_get_info": lambda: (int(free), 1 << 40),
        "memory_reserved": lambda: int(kept),
        "memory_allocated": lambda: 0,
        "is_bf16_supported": lambda including_emulation: has_bf16 or including_emulation,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize(
    ("n_elements", "free", "tokens", "expected"),
    [
        (7.2e9, 23e9, TOKENS, BF16),
        (7.2e9, 79e9, TOKENS, FP32),
        (7.2e9, 31e9, TOKENS, BF16),  # 28.8 GB of weights, which leave too little
        (2.9e9, 23e9, TOKENS, FP32),
        (2.9e9, 23e9, 16 * 4096, BF16),  # 21 GB of activations
    ],
)
def test_fp32_is_taken_where_it_fits(
    n_elements: float,
    free: float,
    tokens: int,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="rwkv_cluster")
    _gpu(monkeypatch, free)
    assert inference_dtype(_weights(n_elements, BF16), "cuda", tokens=tokens) == expected
    assert len(caplog.records) == (expected != FP32)
    _gpu(monkeypatch, free / 2, kept=free / 2)  # what torch keeps in this process is free, too
    assert inference_dtype(_weights(n_elements, BF16), "cuda", tokens=tokens) == expected


@pytest.mark.parametrize(
    ("stored_in", "trained_in", "has_bf16", "expected"),
    [
        (BF16, FP32, True, BF16),
        (FP32, FP32, True, BF16),
        (FP16, FP32, True, FP16),
        (FP32, FP16, True, FP16),
        (FP16, BF16, True, BF16),
        (BF16, BF16, False, FP16),
        (FP32, FP32, False, FP16),
    ],
)
def test_16_bits_are_those_of_the_run_or_the_weights(
    stored_in: torch.dtype,
    trained_in: torch.dtype,
    has_bf16: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _gpu(monkeypatch, 23e9, has_bf16=has_bf16)
    weights = _weights(7.2e9, stored_in)
    assert inference_dtype(weights, "cuda", tokens=TOKENS, trained_in=trained_in) == expected


def test_a_cpu_has_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace())
    assert inference_dtype(_weights(70e9, BF16), "cpu", tokens=TOKENS, trained_in=BF16) == FP32
