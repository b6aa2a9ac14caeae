"""A version that there is not, as its author would add it: blocks, initial values and a row.

Time mix: y = WKV-6 of r, k, v under a decay that does not depend on the data, gated by a LoRA of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import ops
from rwkv_cluster.model.layers import HeadNorm, Linear, NormMix, linear, uninitialized
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.versions.channel_mix import GatedChannelMix
from rwkv_cluster.model.versions.initial import Fill, delta, fraction, uniform, zeros
from rwkv_cluster.model.versions.version import ModelDims, Passes, SavedTensors, Shapes, Version


class TimeMix(nn.Module):
    """Attention [B,T,C] -> [B,T,C]."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        widths = model_dims(config)
        C, self.n_head, self.wkv_backend = widths.embd, widths.n_head, wkv_backend
        self.decay = uninitialized(widths.n_head, widths.head_size)
        self.g1, self.g2 = uninitialized(C, widths.gate_rank), uninitialized(widths.gate_rank, C)
        self.receptance, self.key, self.value, self.output = (Linear(C, C) for _ in range(4))
        self.ln_x = HeadNorm(C)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: NormMix,
        v_first: None,
        before: Tensor | None,
        wkv: Tensor | None,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor]:
        x, (h,), last = norm(x, branch, (None,), before, starts)
        r, k, v = (layer(h).unflatten(-1, (self.n_head, -1)) for layer in (self.receptance, self.key, self.value))
        w = self.decay.expand_as(r).contiguous()
        y, wkv = ops.wkv6(r, k, v, w, torch.zeros_like(self.decay), wkv, starts=starts, backend=self.wkv_backend)
        gate = linear(torch.tanh(linear(h, self.g1.t())), self.g2.t())
        y = y.flatten(2) * self.ln_x.weight + self.ln_x.bias
        return x, self.output(y * (1 + gate)), v_first, last, wkv


ChannelMix = partial(GatedChannelMix, mix="time_mix", mixes_current=True)

INITIAL_MATRICES: dict[str, Fill] = {"att.output.weight": zeros, "att.g1": uniform, "att.g2": uniform}


def initial_vectors(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    ramp = delta(widths.embd) ** phi
    return {"att.decay": -6 + 5 * fraction(widths.att), "ffn.time_mix_k": ramp, "ffn.time_mix_r": ramp}


def _time_mix(widths: ModelDims) -> Shapes:
    C, D = widths.embd, widths.gate_rank
    matrices = {f"{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    return {"decay": (widths.n_head, widths.head_size), "g1": (C, D), "g2": (D, C), **matrices}


def _channel_mix(widths: ModelDims) -> Shapes:
    C, F = widths.embd, widths.ffn
    vectors = {"time_mix_k": (1, 1, C), "time_mix_r": (1, 1, C)}
    return {**vectors, "key.weight": (F, C), "receptance.weight": (C, C), "value.weight": (C, F)}


def _ranks_of(shapes: Shapes) -> Mapping[str, int]:
    return {"gate_lora_rank": shapes["blocks.0.att.g1"][1]}


ROW = Version(
    name="next",
    title="next",
    module="rwkv_next",
    operator="wkv6",
    ffn_width=lambda C: 2 * C,
    default_ranks=lambda C: {"gate": 8},
    time_mix=_time_mix,
    channel_mix=_channel_mix,
    per_head="decay",
    recognises=lambda shapes: "blocks.0.att.decay" in shapes,
    ranks_of=_ranks_of,
    optimizer_group=lambda name, is_matrix: (3.0 if "att.decay" in name else 1.0, is_matrix),
    saved=SavedTensors(of_width=10),
    passes=Passes(forward=80, training=250, launches_forward=40, launches=140),
    passes_native=Passes(forward=50, training=120, launches_forward=30, launches=80),
    passes_wide=Passes(forward=54, training=135, launches_forward=40, launches=95),
    loras=(("g1", "g2"),),
)
