"""RWKV-5.2 ("x052"): RWKV_TimeMix_RWKV5 and RWKV_ChannelMix of RWKV-LM's RWKV-v5/src/model.py.

B batch, T time, H heads, N head size, C width, A = H * N attention width.
Token mixes interpolate between the previous and the current token; decay = exp(-exp(w)) is constant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import ops
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.layers import HeadNorm, Linear, mixed, uninitialized
from rwkv_cluster.model.shapes import ModelDims


class TimeMix(nn.Module):
    """Attention of RWKV-5: one learned decay per head and key channel."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        widths = ModelDims.of(config)
        C, A, H, N = widths.embd, widths.att, widths.n_head, widths.head_size
        self.n_head, self.wkv_backend, self.fused = H, wkv_backend, fused_choice
        self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g = (uninitialized(1, 1, C) for _ in range(4))
        self.time_decay = uninitialized(H, N)
        self.time_faaaa = uninitialized(H, N)
        self.receptance = Linear(C, A)
        self.key = Linear(C, A)
        self.value = Linear(C, A)
        self.gate = Linear(C, A)
        self.output = Linear(A, C)
        self.ln_x = HeadNorm(A)

    def forward(
        self, x: Tensor, v_first: None, before: Tensor | None, wkv: Tensor | None
    ) -> tuple[Tensor, None, Tensor]:
        """x [B,T,C], before [B,C], wkv [B,H,N,N] -> out [B,T,C], None, final wkv. v_first is RWKV-7's."""
        mixes = (self.time_mix_r, self.time_mix_k, self.time_mix_v, self.time_mix_g)
        x_r, x_k, x_v, x_g = mixed(x, before, [1 - mix.to(x.dtype) for mix in mixes], self.fused)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, k, v = (z.unflatten(-1, (self.n_head, -1)) for z in (r, k, v))  # [B,T,H,N]
        decay, bonus = self.time_decay.to(r.dtype), self.time_faaaa.to(r.dtype)  # [H,N]
        y, wkv = ops.wkv5(r, k, v, decay, bonus, wkv, backend=self.wkv_backend)
        norm = self.ln_x
        z = fused.gated_norm(y, self.gate(x_g), norm.weight, norm.bias, choice=self.fused)  # [B,T,A]
        return self.output(z), v_first, wkv


class ChannelMix(nn.Module):
    """Feed-forward of RWKV-5: relu(k)² under a sigmoid receptance."""

    def __init__(self, config: ModelConfig, layer: int, fused_choice: str) -> None:
        super().__init__()
        self.fused = fused_choice
        widths = ModelDims.of(config)
        self.time_mix_k = uninitialized(1, 1, widths.embd)
        self.time_mix_r = uninitialized(1, 1, widths.embd)
        self.key = Linear(widths.embd, widths.ffn)
        self.receptance = Linear(widths.embd, widths.embd)
        self.value = Linear(widths.ffn, widths.embd)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:  # [B,T,C], [B,C] -> [B,T,C]
        x_k, x_r = mixed(x, before, [1 - mix.to(x.dtype) for mix in (self.time_mix_k, self.time_mix_r)], self.fused)
        return torch.sigmoid(self.receptance(x_r)) * self.value(fused.squared_relu(self.key(x_k), choice=self.fused))
