"""DoRA, y = m (W + s B A) x / |W + s B A|: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.

W [out,in], A [r,in], B [out,r], m [out]; the length |.| is of each row, and a constant for the gradient (section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_cluster.adapters import lora
from rwkv_cluster.adapters.peft_adapter import PeftAdapter
from rwkv_cluster.adapters.quantized.matrix import FrozenMatrix, frozen_linear, whole
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.model.layers import linear


def initial(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """LoRA's A and B, and the lengths of W's rows: the update begins at zero."""
    parts = lora.initial(weight, rank, scale, generator)
    return {**parts, "lora_magnitude_vector": row_lengths(weight, parts["lora_A"], parts["lora_B"], scale)}


def product(x: Tensor, dropped: Tensor, weight: FrozenMatrix, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """m / |W + s B A| (W x + s B A x') of x [...,in]; dropped: x', x after dropout. In x's dtype."""
    A, B, length = (parts[name] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    factor = (length / row_lengths(whole(weight, x.dtype), A, B, scale)).to(x.dtype)  # [out]
    return factor * (frozen_linear(x, weight) + lora.update(dropped, A, B, scale))


def merged(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """m (W + s B A) / |W + s B A|, in weight's dtype."""
    A, B, length = (parts[name] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    factor = length.to(weight.dtype) / row_lengths(weight, A.to(weight.dtype), B.to(weight.dtype), scale)
    return factor.unsqueeze(-1) * lora.merged(weight, parts, scale)


def in_peft(parts: Mapping[str, Tensor], adapter: AdapterConfig) -> PeftAdapter:
    """The parts under peft's names, and what its adapter_config.json says of them."""
    plain = lora.in_peft(parts, adapter)
    length = {"lora_magnitude_vector": parts["lora_magnitude_vector"]}
    return PeftAdapter({**plain.settings, "use_dora": True}, {**plain.tensors, **length})


@torch.no_grad()
def row_lengths(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """|W + s B A| of each row [out], in fp32 or better, without a tensor of W's size.

    |W|^2 + 2 s <W, B A> + s^2 |B A|^2, where row o has <W, B A> = B_o (A W_o) and |B A|^2 = B_o A A^T B_o.
    """
    accurate = torch.promote_types(weight.dtype, torch.float32)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=accurate).square()
    across = linear(weight, A).to(accurate)  # [out,r]
    A, B = A.to(accurate), B.to(accurate)
    both = (B * across).sum(1)
    update = (B @ (A @ A.t()) * B).sum(1)
    return (own + 2 * scale * both + scale * scale * update).clamp_min(0).sqrt()
