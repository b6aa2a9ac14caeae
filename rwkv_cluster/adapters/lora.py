"""LoRA, y = W x + s B A x: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

W [out,in], A [r,in], B [out,r]; s = alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_cluster.adapters.peft_adapter import PeftAdapter
from rwkv_cluster.adapters.quantized.matrix import FrozenMatrix, frozen_linear
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.model.layers import linear


def initial(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A from a uniform distribution on +-1 / sqrt(in), as peft's, and B zero: the update begins at zero.

    A is rounded to W's dtype, so that a run whose parameters have that begins with the same values as any other.
    """
    n_out, n_in = weight.shape
    bound = 1 / math.sqrt(n_in)
    A = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
    return {"lora_A": A.to(weight.dtype), "lora_B": torch.zeros(n_out, rank)}


def product(x: Tensor, dropped: Tensor, weight: FrozenMatrix, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W x + s B A x' of x [...,in]; dropped: x', x after dropout. In x's dtype."""
    return frozen_linear(x, weight) + update(dropped, parts["lora_A"], parts["lora_B"], scale)


def merged(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W + s B A, in weight's dtype."""
    return weight + scale * (parts["lora_B"].to(weight.dtype) @ parts["lora_A"].to(weight.dtype))


def in_peft(parts: Mapping[str, Tensor], adapter: AdapterConfig) -> PeftAdapter:
    """The parts under peft's names, and what its adapter_config.json says of them."""
    A, B = parts["lora_A"], parts["lora_B"]
    rank = A.shape[0]
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": adapter.dropout,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    return PeftAdapter(settings, {"lora_A.weight": A, "lora_B.weight": B})


def update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """s B A x, with the factor on the small tensor."""
    return linear(scale * linear(x, A), B)
