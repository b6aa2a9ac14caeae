"""A training step of a small model beside float64: what `rwkv-cluster doctor` runs on a machine.

It meets every compiled kernel that a step has: WKV, the passes between the products, and on a GPU the loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.loss import target_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import VERSIONS

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Allowed relative L2 error of all gradients as one vector. In bfloat16 each product and each pass rounds, to 1.6e-2 on
CPUs."""

SEED = 7
ROWS, TIME = 2, 37


def run(device: str) -> Iterator[tuple[str, torch.dtype, float, float]]:
    """Version, dtype, relative L2 error of the gradients of a loss, and allowed error, on `device`.

    The worse of one document a row and of several.
    """
    for version in VERSIONS:
        for dtype, limit in LIMITS.items():
            yield version, dtype, max(_error(version, dtype, device, documents) for documents in (False, True)), limit


def _error(version: str, dtype: torch.dtype, device: str, documents: bool) -> float:
    model = _model(version, "auto", "auto").to(dtype)
    exact = _model(version, "reference", "plain").double()
    exact.load_state_dict(model.state_dict())  # the same numbers, as rounded
    found, wanted = (_gradients(each, documents) for each in (model.to(device), exact))
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def _model(version: str, wkv_backend: str, fused: str) -> RWKV:
    """Two layers with two heads of 64, and no matrix of zeros, behind which gradients would be zero too."""
    config = ModelConfig(model_type=version, n_layer=2, n_embd=128, head_size_a=64, vocab_size=96)
    model = RWKV(config, wkv_backend=wkv_backend, fused=fused)
    initialize(model, SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    return model


def _gradients(model: RWKV, documents: bool) -> Tensor:
    """The gradients of all parameters that have one, as one vector in the dtype of the model."""
    generator = torch.Generator().manual_seed(SEED)
    device = model.emb.weight.device
    tokens = torch.randint(96, (ROWS, TIME + 1), generator=generator)
    starts = (torch.rand(ROWS, TIME, generator=generator) < 0.1).to(device) if documents else None
    inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    target_loss(model, inputs, targets, 1e-4, starts=starts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
