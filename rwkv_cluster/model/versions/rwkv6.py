"""RWKV-6 ("x060"): RWKV_Tmix_x060 and RWKV_CMix_x060 of RWKV-LM's RWKV-v5/src/model.py.

B batch, T time, H heads, N head size, C width, A = H * N attention width; M mix rank, D decay rank.
Δ = σ(x) - x is the token shift; decay = exp(-exp(w)) with one w per token and channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import ops
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.layers import HeadNorm, Linear, linear, mixed, shift_delta, uninitialized
from rwkv_cluster.model.shapes import ModelDims


class TimeMix(nn.Module):
    """Attention of RWKV-6: token mix and decay depend on the data through low-rank corrections."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        widths = ModelDims.of(config)
        C, A, M, D = widths.embd, widths.att, widths.mix_rank, widths.decay_rank
        self.n_head, self.wkv_backend, self.fused = widths.n_head, wkv_backend, fused_choice
        self.time_maa_x, self.time_maa_w, self.time_maa_k = (uninitialized(1, 1, C) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (uninitialized(1, 1, C) for _ in range(3))
        self.time_maa_w1 = uninitialized(C, 5 * M)
        self.time_maa_w2 = uninitialized(5, M, C)
        self.time_decay = uninitialized(1, 1, A)
        self.time_decay_w1 = uninitialized(C, D)
        self.time_decay_w2 = uninitialized(D, A)
        self.time_faaaa = uninitialized(widths.n_head, widths.head_size)
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
        x_w, x_k, x_v, x_r, x_g = self._mix(x, before)
        hidden = torch.tanh(linear(x_w, self.time_decay_w1.t()))  # [B,T,D]
        w = linear(hidden, self.time_decay_w2.t(), self.time_decay.flatten())  # [B,T,A]
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, k, v, w = (z.unflatten(-1, (self.n_head, -1)) for z in (r, k, v, w))  # [B,T,H,N]
        y, wkv = ops.wkv6(r, k, v, w, self.time_faaaa.to(r.dtype), wkv, backend=self.wkv_backend)
        norm = self.ln_x
        z = fused.gated_norm(y, self.gate(x_g), norm.weight, norm.bias, choice=self.fused)  # [B,T,A]
        return self.output(z), v_first, wkv

    def _mix(self, x: Tensor, before: Tensor | None) -> list[Tensor]:
        """The inputs of w, k, v, r, g, in this order: 5 x [B,T,C]."""
        delta = shift_delta(x, before)
        (base,) = fused.blend(x, delta, (self.time_maa_x,), choice=self.fused)
        low = torch.tanh(linear(base, self.time_maa_w1.t()))  # [B,T,5M]
        constant = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        mixes = [
            linear(part, up.t(), maa.flatten())
            for part, up, maa in zip(low.chunk(5, dim=-1), self.time_maa_w2, constant, strict=True)
        ]
        return list(fused.blend(x, delta, mixes, choice=self.fused))


class ChannelMix(nn.Module):
    """Feed-forward of RWKV-6: relu(k)² under a sigmoid receptance."""

    def __init__(self, config: ModelConfig, layer: int, fused_choice: str) -> None:
        super().__init__()
        self.fused = fused_choice
        widths = ModelDims.of(config)
        self.time_maa_k = uninitialized(1, 1, widths.embd)
        self.time_maa_r = uninitialized(1, 1, widths.embd)
        self.key = Linear(widths.embd, widths.ffn)
        self.receptance = Linear(widths.embd, widths.embd)
        self.value = Linear(widths.ffn, widths.embd)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:  # [B,T,C], [B,C] -> [B,T,C]
        x_k, x_r = mixed(x, before, (self.time_maa_k, self.time_maa_r), self.fused)
        return torch.sigmoid(self.receptance(x_r)) * self.value(fused.squared_relu(self.key(x_k), choice=self.fused))
