"""What an adapter beside one matrix is in Hugging Face peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PeftAdapter:
    """settings: fields of adapter_config.json. tensors: by their names below the matrix's module."""

    settings: Mapping[str, object]
    tensors: Mapping[str, Tensor]
