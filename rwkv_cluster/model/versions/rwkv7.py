"""RWKV-7 ("x070"): RWKV_Tmix_x070 and RWKV_CMix_x070 of RWKV-LM's RWKV-v7/train_temp/src/model.py.

B batch, T time, H heads, N head size, C = H * N width; ranks Dw, Da, Dv, Dg of the four LoRAs.
Δ = σ(x) - x is the token shift; ω the decay logit, decay = exp(-e^{-1/2} sigmoid(ω)).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import documents, ops
from rwkv_cluster.kernels.documents import Starts
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.layers import HeadNorm, Linear, NormMix, OwnMatrices, linear, tanh_linear, uninitialized
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.versions.initial import Fill, delta, fraction, lora_orthogonal, small_orthogonal, zeros
from rwkv_cluster.model.versions.version import ModelDims


class TimeMix(OwnMatrices):
    """Attention of RWKV-7: a state that is decayed, corrected along κ and written with v kᵀ."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        widths = model_dims(config)
        C, H, N = widths.embd, widths.n_head, widths.head_size
        self.layer, self.n_head = layer, H
        self.wkv_backend, self.fused = wkv_backend, fused_choice
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (uninitialized(1, 1, C) for _ in range(6))
        self.w0, self.a0, self.k_k, self.k_a = (uninitialized(1, 1, C) for _ in range(4))
        self.w1, self.w2 = uninitialized(C, widths.decay_rank), uninitialized(widths.decay_rank, C)
        self.a1, self.a2 = uninitialized(C, widths.a_rank), uninitialized(widths.a_rank, C)
        self.g1, self.g2 = uninitialized(C, widths.gate_rank), uninitialized(widths.gate_rank, C)
        if layer > 0 or config.block0_value_residual:
            self.v0 = uninitialized(1, 1, C)
            self.v1 = uninitialized(C, widths.v_rank)
            self.v2 = uninitialized(widths.v_rank, C)
            for parameter in (self.v0, self.v1, self.v2):
                parameter.requires_grad_(layer > 0)  # block 0 defines v_first and never uses them
        self.r_k = uninitialized(H, N)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = HeadNorm(C)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: NormMix,
        v_first: Tensor | None,
        before: Tensor | None,
        wkv: Tensor | None,
        starts: Starts | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """The residual x + branch [B,T,C], what is to be added to it, v_first, and the state's parts, see `NormMix`.

        v_first [B,T,C] (block 0: None), before [B,C], wkv [B,H,N,N], starts [B,T].
        """
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x, (x_r, x_w, x_k, x_v, x_a, x_g), last = norm(x, branch, mixes, before, starts)
        r = self.receptance(x_r)
        k = self.key(x_k)
        v, v_mix = self._values(x_v, is_first=v_first is None)
        omega = tanh_linear(self._product(x_w, "w1"), self.matrix("w2", x_w), self.w0.flatten())
        a = self._product(self._product(x_a, "a1"), "a2")  # without bias and sigmoid, as v_mix is
        gate = self._product(torch.sigmoid(self._product(x_g, "g1")), "g2")
        vectors = (self.k_k, self.k_a, self.r_k, self.a0, None if v_first is None else self.v0)
        prepared = fused.prepare(r, k, a, v, v_first, v_mix, *vectors, choice=self.fused)
        inputs = (prepared.r, omega, prepared.k, prepared.v, prepared.removed, prepared.replaced)
        y, wkv = documents.run(ops.wkv7, [self._heads(z) for z in inputs], wkv, starts, self.wkv_backend)  # [B,T,H,N]
        readout = prepared.v_again, prepared.bonus, gate, self.ln_x.weight, self.ln_x.bias
        z = fused.gated_readout(y, *readout, choice=self.fused)  # [B,T,C]
        return x, self.output(z), prepared.v_first, last, wkv

    def _values(self, x_v: Tensor, *, is_first: bool) -> tuple[Tensor, Tensor | None]:
        """Values [B,T,C] and, but in block 0, the LoRA that mixes them with block 0's."""
        if is_first:
            return self.value(x_v), None
        if isinstance(self.value, Linear) and self.value.weight.requires_grad:
            v, hidden = self.value(x_v, self.matrix("v1", x_v))
        else:  # an adapter's or a quantised one, or frozen, where it has the same bits as quantised
            v, hidden = self.value(x_v), self._product(x_v, "v1")
        return v, self._product(hidden, "v2")

    def _product(self, x: Tensor, name: str) -> Tensor:
        """x [B,T,..] times a LoRA's matrix."""
        return linear(x, self.matrix(name, x).t())

    def _heads(self, z: Tensor) -> Tensor:  # [B,T,C] -> [B,T,H,N]
        return z.unflatten(-1, (self.n_head, -1))


class ChannelMix(nn.Module):
    """Feed-forward of RWKV-7: relu(k)² without receptance."""

    def __init__(self, config: ModelConfig, layer: int, fused_choice: str) -> None:
        super().__init__()
        self.fused = fused_choice
        widths = model_dims(config)
        self.x_k = uninitialized(1, 1, widths.embd)
        self.key = Linear(widths.embd, widths.ffn)
        self.value = Linear(widths.ffn, widths.embd)

    def forward(
        self, x: Tensor, branch: Tensor, norm: NormMix, before: Tensor | None, starts: Starts | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x + branch [B,T,C], what is to be added to it, and the state's part, see `NormMix`."""
        x, (k,), last = norm(x, branch, (self.x_k,), before, starts)
        return x, self.value(fused.squared_relu(self.key(k), choice=self.fused)), last


INITIAL_MATRICES: dict[str, Fill] = {
    "att.output.weight": zeros,
    "ffn.value.weight": zeros,
    "att.key.weight": small_orthogonal,
    **dict.fromkeys(("att.w1", "att.a1", "att.v1", "att.g1"), zeros),
    **dict.fromkeys(("att.w2", "att.a2", "att.v2", "att.g2"), lora_orthogonal),
}
"""Fills of the matrices that are not simply orthogonal."""


def initial_vectors(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    """Deterministic tensors of a block, flattened, in float64; rho and phi as in `model.init`."""
    C, N = widths.embd, widths.head_size
    ramp = delta(C)
    linear_ramp = fraction(C) - 0.5
    centred = torch.arange(C, dtype=torch.float64) % N - (N - 1) / 2
    q = centred / max((N - 1) / 2, 0.5)
    zigzag = q * q.abs()
    return {
        "att.x_r": 1 - ramp ** (0.2 * phi),
        "att.x_w": 1 - ramp ** (0.9 * phi),
        "att.x_k": 1 - ramp ** (0.7 * phi),
        "att.x_v": 1 - ramp ** (0.7 * phi),
        "att.x_a": 1 - ramp ** (0.9 * phi),
        "att.x_g": 1 - ramp ** (0.2 * phi),
        "att.w0": -6 + 6 * fraction(C) ** (1 + rho**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear_ramp,
        "att.v0": 0.73 - 0.4 * linear_ramp,
        "att.k_k": 0.71 - 0.1 * linear_ramp,
        "att.k_a": torch.full((C,), 1.02, dtype=torch.float64),
        "att.r_k": torch.full((C,), -0.04, dtype=torch.float64),
        "ffn.x_k": 1 - ramp ** (phi**4),
    }
