"""The weights below an adapter: which they are, and the whole model that both make together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rwkv_cluster.adapters.table import KINDS, targets
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.parameter_shapes import unused_names
from rwkv_cluster.runtime.terminal.time_left import bytes_left


def fingerprint(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """sha256, hexadecimal, of a line `<name> <dtype> <shape>` and the bytes of each tensor, in the order of the names.

    Tensors that no computation uses are left out: programs disagree on whether a file has them. dtype: that each is
    taken in, one at a time; None for its own.
    """
    digest, unused = hashlib.sha256(), unused_names()
    with bytes_left("fingerprint of the base", sum(tensor.nbytes for tensor in weights.values())) as left:
        for name in sorted(weights.keys() - set(unused)):
            whole = weights[name].detach()
            tensor = whole.to("cpu", dtype or whole.dtype).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
            left.advance(whole.nbytes)
    return digest.hexdigest()


def require_base(weights: Mapping[str, Tensor], expected: str, where: str) -> None:
    """Raise CheckpointError, with both fingerprints, where `weights`, those in `where`, are not an adapter's base."""
    if (found := fingerprint(weights)) != expected:
        raise CheckpointError(
            f"{where}: these are not the weights that the adapter was trained on: fingerprint {found}, expected "
            f"{expected}",
            remedy="Name the weights that the run began with",
        )


class MergedTensors:
    """Weights with an adapter in them, by the names of the base, each made when it is asked for.

    base: the whole model's. parts: of the adapter, by name as in `table.adapter_shapes`. A tensor that has no adapter
    is the base's own; the others are computed and returned in fp32.
    """

    def __init__(self, base: Mapping[str, Tensor], parts: Mapping[str, Tensor], adapter: AdapterConfig) -> None:
        self._base, self._adapter = base, adapter
        self._formulas = KINDS[adapter.kind].functions()
        self._parts: dict[str, dict[str, Tensor]] = {}
        for name in targets(adapter, {name: tuple(tensor.shape) for name, tensor in base.items()}):
            found = {key.rpartition(".")[2]: tensor for key, tensor in parts.items() if key.rpartition(".")[0] == name}
            self._parts[f"{name}.weight"] = found

    def keys(self) -> Iterator[str]:
        return iter(self._base)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name].detach()
        if name not in self._parts:
            return weight
        parts = {part: tensor.detach().float() for part, tensor in self._parts[name].items()}
        merged: Tensor = self._formulas.merged(weight.float(), parts, self._adapter.scale)
        return merged
