"""Initial weights, exactly RWKV-LM's: its constructors' vectors, then `generate_init_weight` on the matrices.

x070 follows RWKV-v7/train_temp/src/model.py, x052 and x060 RWKV-v5/src/model.py. At step 0 every block is the
identity (output and value matrices are 0), so that the loss is close to ln V.

Every tensor draws from a generator of its own, seeded by (seed, name): the weights depend neither on the
order of initialisation nor on which other tensors exist.

C width, A attention width, N head size, L blocks. rho = layer / (L - 1), phi = 1 - layer / L.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.shapes import ModelDims

ZERO_MATRICES = ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")
SMALL_MATRICES = (
    "att.key.weight",
    "att.gate.weight",
)  # gain 0.1; the other matrices 1
ZERO_LORAS = ("att.w1", "att.a1", "att.v1", "att.g1", "att.time_maa_w1", "att.time_decay_w1")
UNIFORM_LORAS = ("att.time_maa_w2", "att.time_decay_w2")
ORTHOGONAL_LORAS = ("att.w2", "att.a2", "att.v2", "att.g2")


@torch.no_grad()
def initialize(model: RWKV, seed: int) -> None:
    """Fill every parameter of `model` in place. The same seed gives the same weights on every device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.config, name, parameter.shape, seed))


def initial_value(config: ModelConfig, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Initial value of the one tensor `name`, float32 or float64 on the CPU."""
    if name.startswith("blocks."):
        _, layer, suffix = name.split(".", 2)
        vector = vectors_of_block(config, int(layer)).get(suffix)
        if vector is not None:
            return vector.view(*shape)
    return _random_value(name, shape, _generator(seed, name))


def vectors_of_block(config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The deterministic tensors of one block, flattened, in float64, by name below `blocks.<layer>.`."""
    widths = ModelDims.of(config)
    version = {"x052": _vectors_x052, "x060": _vectors_x060, "x070": _vectors_x070}[config.model_type]
    rho = layer / (config.n_layer - 1) if config.n_layer > 1 else 0.0
    phi = 1 - layer / config.n_layer
    vectors = version(widths, rho, phi)
    vectors["att.ln_x.weight"] = torch.full((widths.att,), ((1 + layer) / config.n_layer) ** 0.7, dtype=torch.float64)
    return vectors


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _random_value(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """fp32 value of a tensor that is not among `vectors_of_block`."""
    value = torch.empty(*shape)
    if name == "emb.weight":
        return value.uniform_(-1e-4, 1e-4, generator=generator)
    if name == "head.weight":
        V, C = shape
        gain = 0.5 * math.sqrt(V / C) if V > C else 0.5
        return nn.init.orthogonal_(value, gain, generator=generator)
    if name.endswith((*ZERO_MATRICES, *ZERO_LORAS, ".bias")):
        return value.zero_()
    if name.endswith(UNIFORM_LORAS):
        return value.uniform_(-0.01, 0.01, generator=generator)
    if name.endswith(ORTHOGONAL_LORAS):
        rows, cols = shape
        gain = 0.1 * (math.sqrt(rows / cols) if rows > cols else 1.0)
        return nn.init.orthogonal_(value, gain, generator=generator)
    if value.ndim == 1:  # weights of layer norms
        return value.fill_(1.0)
    return nn.init.orthogonal_(value, 0.1 if name.endswith(SMALL_MATRICES) else 1.0, generator=generator)


def _fraction(width: int) -> Tensor:
    """n / (width - 1), n = 0 ... width - 1."""
    return torch.arange(width, dtype=torch.float64) / max(width - 1, 1)


def _delta(width: int) -> Tensor:
    """i / width, i = 0 ... width - 1."""
    return torch.arange(width, dtype=torch.float64) / width


def _decay_and_bonus(att: int, rho: float) -> dict[str, Tensor]:
    """time_decay and time_faaaa, the same in x052 and x060."""
    n = torch.arange(att, dtype=torch.float64)
    zigzag = 0.1 * ((n + 1) % 3 - 1)
    return {
        "att.time_decay": -6 + 5 * _fraction(att) ** (0.7 + 1.3 * rho),
        "att.time_faaaa": rho * (1 - _fraction(att)) + zigzag,
    }


def _vectors_x052(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    delta = _delta(widths.embd)
    return {
        "att.time_mix_k": delta**phi,
        "att.time_mix_v": delta**phi + 0.3 * rho,
        "att.time_mix_r": delta ** (0.5 * phi),
        "att.time_mix_g": delta ** (0.5 * phi),
        "ffn.time_mix_k": delta**phi,
        "ffn.time_mix_r": delta**phi,
        **_decay_and_bonus(widths.att, rho),
    }


def _vectors_x060(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    delta = _delta(widths.embd)
    return {
        "att.time_maa_x": 1 - delta**phi,
        "att.time_maa_w": 1 - delta**phi,
        "att.time_maa_k": 1 - delta**phi,
        "att.time_maa_v": 1 - (delta**phi + 0.3 * rho),
        "att.time_maa_r": 1 - delta ** (0.5 * phi),
        "att.time_maa_g": 1 - delta ** (0.5 * phi),
        "ffn.time_maa_k": 1 - delta ** (phi**3),
        "ffn.time_maa_r": 1 - delta ** (phi**3),
        **_decay_and_bonus(widths.att, rho),
    }


def _vectors_x070(widths: ModelDims, rho: float, phi: float) -> dict[str, Tensor]:
    C, N = widths.embd, widths.head_size
    delta = _delta(C)
    linear = _fraction(C) - 0.5
    centred = torch.arange(C, dtype=torch.float64) % N - (N - 1) / 2
    q = centred / max((N - 1) / 2, 0.5)
    zigzag = q * q.abs()
    return {
        "att.x_r": 1 - delta ** (0.2 * phi),
        "att.x_w": 1 - delta ** (0.9 * phi),
        "att.x_k": 1 - delta ** (0.7 * phi),
        "att.x_v": 1 - delta ** (0.7 * phi),
        "att.x_a": 1 - delta ** (0.9 * phi),
        "att.x_g": 1 - delta ** (0.2 * phi),
        "att.w0": -6 + 6 * _fraction(C) ** (1 + rho**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "att.v0": 0.73 - 0.4 * linear,
        "att.k_k": 0.71 - 0.1 * linear,
        "att.k_a": torch.full((C,), 1.02, dtype=torch.float64),
        "att.r_k": torch.full((C,), -0.04, dtype=torch.float64),
        "ffn.x_k": 1 - delta ** (phi**4),
    }
