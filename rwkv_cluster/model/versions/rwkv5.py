"""RWKV-5.2 ("x052"): RWKV_TimeMix_RWKV5 and RWKV_ChannelMix of RWKV-LM's RWKV-v5/src/model.py.

B batch, T time, H heads, N head size, C width, A = H * N attention width.
Token mixes interpolate between the previous and the current token; decay = exp(-exp(w)) is constant.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import documents, ops
from rwkv_cluster.kernels.documents import Starts
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.layers import HeadNorm, Linear, NormMix, complements, uninitialized
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.versions.channel_mix import GatedChannelMix
from rwkv_cluster.model.versions.initial import Fill, decay_and_bonus, delta, small_orthogonal, zeros
from rwkv_cluster.model.versions.version import ModelDims


class TimeMix(nn.Module):
    """Attention of RWKV-5: one learned decay per head and key channel."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        widths = model_dims(config)
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
        mixes = (self.time_mix_r, self.time_mix_k, self.time_mix_v, self.time_mix_g)
        x, (x_r, x_k, x_v, x_g), last = norm(x, branch, complements(mixes, x.dtype), before, starts)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, k, v = (z.unflatten(-1, (self.n_head, -1)) for z in (r, k, v))  # [B,T,H,N]
        decay, bonus = self.time_decay.to(r.dtype), self.time_faaaa.to(r.dtype)  # [H,N]
        y, wkv = documents.run(ops.wkv5, (r, k, v, decay, bonus), wkv, starts, self.wkv_backend)
        z = fused.gated_norm(y, self.gate(x_g), self.ln_x.weight, self.ln_x.bias, choice=self.fused)  # [B,T,A]
        return x, self.output(z), v_first, last, wkv


ChannelMix = partial(GatedChannelMix, mix="time_mix", mixes_current=True)

INITIAL_MATRICES: dict[str, Fill] = {
    **dict.fromkeys(("att.output.weight", "ffn.value.weight", "ffn.receptance.weight"), zeros),
    **dict.fromkeys(("att.key.weight", "att.gate.weight"), small_orthogonal),
}
"""Fills of the matrices that are not simply orthogonal."""


def initial_vectors(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    """Deterministic tensors of a block, flattened, in float64; rho and phi as in `model.init`."""
    ramp = delta(widths.embd)
    return {
        "att.time_mix_k": ramp**phi,
        "att.time_mix_v": ramp**phi + 0.3 * rho,
        "att.time_mix_r": ramp ** (0.5 * phi),
        "att.time_mix_g": ramp ** (0.5 * phi),
        "ffn.time_mix_k": ramp**phi,
        "ffn.time_mix_r": ramp**phi,
        **decay_and_bonus(widths.att, rho),
    }
