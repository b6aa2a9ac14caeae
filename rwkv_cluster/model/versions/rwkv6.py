"""RWKV-6 ("x060"): RWKV_Tmix_x060 and RWKV_CMix_x060 of RWKV-LM's RWKV-v5/src/model.py.

B batch, T time, H heads, N head size, C width, A = H * N attention width; M mix rank, D decay rank.
Δ = σ(x) - x is the token shift; decay = exp(-exp(w)) with one w per token and channel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import documents, ops
from rwkv_cluster.kernels.documents import Starts, flags
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.layers import (
    HeadNorm,
    Linear,
    NormMix,
    OwnMatrices,
    linear,
    shift_delta,
    tanh_linear,
    uninitialized,
)
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.versions.channel_mix import GatedChannelMix
from rwkv_cluster.model.versions.initial import Fill, decay_and_bonus, delta, small_orthogonal, uniform, zeros
from rwkv_cluster.model.versions.version import ModelDims


class TimeMix(OwnMatrices):
    """Attention of RWKV-6: token mix and decay depend on the data through low-rank corrections."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        widths = model_dims(config)
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
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: NormMix,
        v_first: None,
        before: Tensor | None,
        wkv: Tensor | None,
        starts: Starts | None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor]:
        """The residual x + branch [B,T,C], what is to be added to it, None, and the state's parts, see `NormMix`.

        before [B,C], wkv [B,H,N,N], starts [B,T]. v_first is RWKV-7's.
        """
        x, (h, base), last = norm(x, branch, (None, self.time_maa_x), before, starts)
        x_w, x_k, x_v, x_r, x_g = self._mix(h, base, before, starts)
        hidden = linear(x_w, self.matrix("time_decay_w1", x_w).t())  # [B,T,D]
        w = tanh_linear(hidden, self.matrix("time_decay_w2", x_w), self.time_decay.flatten())  # [B,T,A]
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, k, v, w = (z.unflatten(-1, (self.n_head, -1)) for z in (r, k, v, w))  # [B,T,H,N]
        bonus = self.time_faaaa.to(r.dtype)  # [H,N]
        y, wkv = documents.run(ops.wkv6, (r, k, v, w, bonus), wkv, starts, self.wkv_backend)
        z = fused.gated_norm(y, self.gate(x_g), self.ln_x.weight, self.ln_x.bias, choice=self.fused)  # [B,T,A]
        return x, self.output(z), v_first, last, wkv

    def _mix(self, h: Tensor, base: Tensor, before: Tensor | None, starts: Starts | None) -> list[Tensor]:
        """The inputs of w, k, v, r, g, in this order, 5 x [B,T,C], mixed as `base` says: h + Δ ⊙ time_maa_x."""
        constants = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        low = torch.tanh(linear(base, self.matrix("time_maa_w1", base).t()))  # [B,T,5M]
        factors = zip(low.chunk(5, dim=-1), self.matrix("time_maa_w2", base), strict=True)
        if before is None and fused.is_native(h, self.fused):
            mixes = [linear(part, up.t()) for part, up in factors]
            return list(fused.shift_blend(h, mixes, constants, flags(starts), choice=self.fused))
        # the products add the constants on their way
        mixes = [
            linear(part, up.t(), constant.flatten()) for (part, up), constant in zip(factors, constants, strict=True)
        ]
        return list(fused.blend(h, shift_delta(h, before, starts), mixes, choice=self.fused))


ChannelMix = partial(GatedChannelMix, mix="time_maa", mixes_current=False)

INITIAL_MATRICES: dict[str, Fill] = {
    **dict.fromkeys(("att.output.weight", "ffn.value.weight", "ffn.receptance.weight"), zeros),
    **dict.fromkeys(("att.key.weight", "att.gate.weight"), small_orthogonal),
    **dict.fromkeys(("att.time_maa_w1", "att.time_decay_w1"), zeros),
    **dict.fromkeys(("att.time_maa_w2", "att.time_decay_w2"), uniform),
}
"""Fills of the matrices that are not simply orthogonal."""


def initial_vectors(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    """Deterministic tensors of a block, flattened, in float64; rho and phi as in `model.init`."""
    ramp = delta(widths.embd)
    return {
        "att.time_maa_x": 1 - ramp**phi,
        "att.time_maa_w": 1 - ramp**phi,
        "att.time_maa_k": 1 - ramp**phi,
        "att.time_maa_v": 1 - (ramp**phi + 0.3 * rho),
        "att.time_maa_r": 1 - ramp ** (0.5 * phi),
        "att.time_maa_g": 1 - ramp ** (0.5 * phi),
        "ffn.time_maa_k": 1 - ramp ** (phi**3),
        "ffn.time_maa_r": 1 - ramp ** (phi**3),
        **decay_and_bonus(widths.att, rho),
    }
