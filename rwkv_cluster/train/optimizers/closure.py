"""The closure that torch hands to `Optimizer.step`: it computes the loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What `closure` returns, called with gradients on; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
