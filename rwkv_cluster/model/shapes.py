"""Every derived width of a model: what RWKV-LM computes from `n_embd` when the configuration leaves it open.

Torch-free, so that planning a run needs no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_cluster.config import ModelConfig


@dataclass(frozen=True)
class ModelDims:
    """Resolved widths and ranks. A rank that the architecture lacks is the default of one that has it."""

    embd: int
    att: int
    ffn: int
    n_head: int
    head_size: int
    mix_rank: int
    decay_rank: int
    a_rank: int
    v_rank: int
    gate_rank: int

    @classmethod
    def of(cls, config: ModelConfig) -> ModelDims:
        """ModelDims of `config`; LoRA ranks of x070 by RWKV-LM's train_temp rule, of x060 32 and 64 as there."""
        C = config.n_embd
        att = config.dim_att or C
        is_x070 = config.model_type == "x070"
        return cls(
            embd=C,
            att=att,
            ffn=config.dim_ffn or (4 * C if is_x070 else int(3.5 * C) // 32 * 32),
            n_head=att // config.head_size_a,
            head_size=config.head_size_a,
            mix_rank=config.mix_lora_rank or 32,
            decay_rank=config.decay_lora_rank or (_rank(2.5, C) if is_x070 else 64),
            a_rank=config.a_lora_rank or _rank(2.5, C),
            v_rank=config.v_lora_rank or _rank(1.7, C),
            gate_rank=config.gate_lora_rank or _rank(5.0, C),
        )


def _rank(factor: float, width: int) -> int:
    """factor * sqrt(width) to the nearest multiple of 32 (half to even), at least 32."""
    return max(32, 32 * round(factor * math.sqrt(width) / 32))
