"""Matrices of a model with an adapter beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_cluster.adapters.quantized.matrix import FrozenMatrix, QuantizedLinear, QuantizedMatrix, quantize_linears
from rwkv_cluster.adapters.quantized.table import is_quantized
from rwkv_cluster.adapters.table import KINDS, STATE, targets
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.init import generator_of
from rwkv_cluster.model.layers import uninitialized
from rwkv_cluster.model.own_state import add_own_state
from rwkv_cluster.model.rwkv import RWKV


class AdaptedLinear(nn.Module):
    """A Linear's weight [out,in], frozen, with the parts of an adapter. All are parameters of this one module.

    A quantised one has `codes` and `absmax` in place of `weight`.

    ZeRO-3 gathers a module's own parameters where it is called, and not those of modules in it.
    """

    def __init__(self, weight: nn.Parameter | QuantizedMatrix, adapter: AdapterConfig) -> None:
        super().__init__()
        row = KINDS[adapter.kind]
        self.kind, self.quant = adapter.kind, adapter.quant
        n_out, n_in = weight.shape
        self._shape = n_out, n_in
        if isinstance(weight, QuantizedMatrix):
            self.codes, self.absmax = weight.codes, weight.absmax
            dtype = weight.absmax.dtype
        else:
            self.weight, dtype = weight.requires_grad_(False), weight.dtype
        self._formulas = row.functions()
        self._rank, self._scale, self._dropout = adapter.rank, adapter.scale, adapter.dropout
        trained, kept = row.trained(n_out, n_in, adapter.rank), row.kept(n_out, n_in, adapter.rank)
        self.part_names = (*trained, *kept)
        for name, shape in trained.items():
            self.register_parameter(name, uninitialized(*shape))
        for name, shape in kept.items():
            value = uninitialized(*shape).detach().to(dtype)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the adapter for the weight as it is: the output does not change by it."""
        frozen = self.frozen
        weight = frozen if isinstance(frozen, Tensor) else frozen.whole(frozen.absmax.dtype)
        for name, value in self._formulas.initial(weight, self._rank, self._scale, generator).items():
            self.get_parameter(name).copy_(value)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        dropped = F.dropout(x, self._dropout) if self._dropout and torch.is_grad_enabled() else x
        output: Tensor = self._formulas.product(x, dropped, self.frozen, self._parts(), self._scale)
        return output

    def merged(self, weight: Tensor) -> Tensor:
        """The one matrix [out,in] that is the same, in the dtype of `weight`, the frozen one."""
        matrix: Tensor = self._formulas.merged(weight, self._parts(), self._scale)
        return matrix

    @property
    def frozen(self) -> FrozenMatrix:
        """The matrix below the adapter."""
        if self.quant == "none":
            return self.weight
        return QuantizedMatrix(self.codes, self.absmax, self.quant, self._shape)

    def _parts(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name) for name in self.part_names}


def attach(model: RWKV, adapter: AdapterConfig) -> None:
    """Put an adapter beside the matrices of `model` that `adapter` targets, to be initialised or loaded.

    It has the names, shapes and order of `table.adapter_shapes`. With adapter.quant the blocks' dense matrices are
    quantised as they are now. Raises ConfigError for a target that fits no matrix.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if adapter.quant != "none":
        dense = (name.removesuffix(".weight") for name, shape in shapes.items() if is_quantized(name, shape))
        quantize_linears(model, dense, adapter.quant)
    if adapter.kind == STATE:
        add_own_state(model, with_shifts=adapter.token_shifts)
        return
    for name in targets(adapter, shapes):
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        weight = linear.matrix if isinstance(linear, QuantizedLinear) else model.get_parameter(f"{name}.weight")
        setattr(model.get_submodule(parent), leaf, AdaptedLinear(weight, adapter))
    model.preserve_rng_state = adapter.dropout > 0


def initialize_adapter(model: RWKV, seed: int) -> None:
    """Fill the adapter of a model that has its weights. The same seed gives the same values."""
    for name, module in _adapted(model):
        module.initialize(generator_of(seed, name))


def load_adapter(model: RWKV, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapter of `model` with tensors by name. Raises CheckpointError where they are those of another one."""
    shapes = {name: tuple(model.get_parameter(name).shape) for name in adapter_names(model)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name = different[0]
        raise CheckpointError(
            f"the adapter is another one: {name} is {found.get(name, 'not there')}, this run has "
            f"{shapes.get(name, 'no such part')}",
            remedy="Put adapter.* back as it was",
        )
    model.load_state_dict(dict(tensors), strict=False)


def saved_names(model: nn.Module) -> set[str]:
    """Names of the parameters that a checkpoint of `model` holds: those of its adapter, where it has one, or all."""
    return adapter_names(model) or {name for name, _ in model.named_parameters()}


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to an adapter; none where there is no adapter."""
    of_state = {name for name, _ in model.named_parameters() if ".own_state." in name}
    return of_state | {f"{name}.{part}" for name, module in _adapted(model) for part in module.part_names}


def _adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))
