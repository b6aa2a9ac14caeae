"""Initial weights, exactly RWKV-LM's: its constructors' vectors, then `generate_init_weight` on the matrices.

RWKV-7 follows RWKV-v7/train_temp/src/model.py, RWKV-5 and RWKV-6 RWKV-v5/src/model.py; what each of them has of its
own stands in its file in `model.versions`. At step 0 every block is the identity (output and value matrices are 0), so
that the loss is close to ln V.

Every tensor draws from a generator of its own, seeded by (seed, name): the weights depend neither on the
order of initialisation nor on which other tensors exist.

C width, A attention width, N head size, L blocks. rho = layer / (L - 1), phi = 1 - layer / L.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.initial import Fill, orthogonal
from rwkv_cluster.model.versions.table import version_of


@torch.no_grad()
def initialize(model: RWKV, seed: int) -> None:
    """Fill every parameter of `model` in place. The same seed gives the same weights on every device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.config, name, parameter.shape, seed))


def initial_value(config: ModelConfig, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Initial value of the one tensor `name`, float32 or float64 on the CPU."""
    if not name.startswith("blocks."):
        return _outside_blocks(name, torch.empty(*shape), generator_of(seed, name))
    _, layer, suffix = name.split(".", 2)
    vector = vectors_of_block(config, int(layer)).get(suffix)
    if vector is not None:
        return vector.view(*shape)
    fills: Mapping[str, Fill] = version_of(config).blocks().INITIAL_MATRICES
    return _in_block(suffix, torch.empty(*shape), generator_of(seed, name), fills)


def vectors_of_block(config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The deterministic tensors of one block, flattened, in float64, by name below `blocks.<layer>.`."""
    widths = model_dims(config)
    rho = layer / (config.n_layer - 1) if config.n_layer > 1 else 0.0
    phi = 1 - layer / config.n_layer
    vectors: dict[str, Tensor] = version_of(config).blocks().initial_vectors(widths, rho, phi)
    vectors["att.ln_x.weight"] = torch.full((widths.att,), ((1 + layer) / config.n_layer) ** 0.7, dtype=torch.float64)
    return vectors


def generator_of(seed: int, name: str) -> torch.Generator:
    """Generator on the CPU of the tensor `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _outside_blocks(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """`value`, fp32, filled as embedding, head or norm."""
    if name == "emb.weight":
        return value.uniform_(-1e-4, 1e-4, generator=generator)
    if name == "head.weight":
        V, C = value.shape
        gain = 0.5 * math.sqrt(V / C) if V > C else 0.5
        return nn.init.orthogonal_(value, gain, generator=generator)
    return _norm(name, value)


def _in_block(suffix: str, value: Tensor, generator: torch.Generator, fills: Mapping[str, Fill]) -> Tensor:
    """`value`, fp32, filled as a matrix or a norm of a block; suffix: its name below `blocks.<layer>.`."""
    return _norm(suffix, value) if value.ndim == 1 else fills.get(suffix, orthogonal)(value, generator)


def _norm(name: str, value: Tensor) -> Tensor:
    """`value` [C] filled as weight or bias of a layer norm."""
    return value.zero_() if name.endswith(".bias") else value.fill_(1.0)
