"""MiSS, y = W x + D^T (sum of x's pieces of r): Kang and Yin, "MiSS: Balancing LoRA Performance and Efficiency", 2024.

W [out,in], D [r,out]. The update of W has D^T once for every r columns; the last of them may be cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_cluster.adapters.peft_adapter import PeftAdapter
from rwkv_cluster.adapters.quantized.matrix import FrozenMatrix, frozen_linear
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.model.layers import linear


def initial(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Zeros: the update begins at zero."""
    return {"miss_block": torch.zeros(rank, weight.shape[0])}


def product(x: Tensor, dropped: Tensor, weight: FrozenMatrix, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W x + D^T (sum of the pieces of x') of x [...,in]; dropped: x', x after dropout. In x's dtype."""
    block = parts["miss_block"]
    missing = -dropped.shape[-1] % block.shape[0]
    padded = F.pad(dropped, (0, missing)) if missing else dropped  # which else copies it
    pieces = padded.unflatten(-1, (-1, block.shape[0])).sum(-2)  # [...,r]
    return frozen_linear(x, weight) + linear(pieces, block.t())


def merged(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W with D^T added to every r columns, in weight's dtype."""
    block, n_in = parts["miss_block"].to(weight.dtype), weight.shape[1]
    return weight + block.t().repeat(1, -(-n_in // block.shape[0]))[:, :n_in]


def in_peft(parts: Mapping[str, Tensor], adapter: AdapterConfig) -> PeftAdapter:
    """The block under peft's name, and what its adapter_config.json says of it."""
    settings = {"peft_type": "MISS", "r": adapter.rank, "miss_dropout": adapter.dropout, "init_weights": True}
    return PeftAdapter(settings, {"miss_block": parts["miss_block"]})
