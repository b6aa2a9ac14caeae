"""Each kind of adapter against its formula written out in float64: outputs, gradients, and the merged matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkv_cluster.adapters.layers import AdaptedLinear
from rwkv_cluster.adapters.table import KINDS
from rwkv_cluster.config import AdapterConfig

OUT, IN, RANK = 10, 14, 4  # MiSS repeats its block three and a half times


def _adapted(kind: str, **fields: float) -> AdaptedLinear:
    """A matrix with an adapter, all in float64, at its initial values."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(OUT, IN, generator=generator))
    layer = AdaptedLinear(weight, AdapterConfig(kind=kind, rank=RANK, **fields))
    layer.initialize(generator)
    return layer.double()


def _moved(layer: AdaptedLinear) -> AdaptedLinear:
    """The same as after some training: every trained part has other values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in KINDS_TRAINED[layer.kind]:
            part = layer.get_parameter(name)
            part += 0.3 * torch.randn(part.shape, generator=generator, dtype=torch.float64)
    return layer


KINDS_TRAINED = {name: tuple(row.trained(OUT, IN, RANK)) for name, row in KINDS.items()}


def _matrix(kind: str, parts: dict[str, Tensor], weight: Tensor, scale: float) -> Tensor:
    """The whole matrix [out,in] that the papers have in place of W."""
    if kind == "miss":
        columns = [weight[:, i] + parts["miss_block"][i % RANK] for i in range(IN)]
        return torch.stack(columns, dim=1)
    update = torch.zeros_like(weight)
    for k in range(RANK):
        update = update + scale * torch.outer(parts["lora_B"][:, k], parts["lora_A"][k])
    if kind == "dora":
        directions = weight + update
        lengths = torch.stack([row.pow(2).sum().sqrt() for row in directions.detach()])
        return parts["lora_magnitude_vector"].unsqueeze(1) * directions / lengths.unsqueeze(1)
    if kind == "pissa":
        residual = weight - scale * parts["first_B"] @ parts["first_A"]
        return residual + update
    return weight + update


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind: str) -> None:
    layer = _moved(_adapted(kind))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, OUT, generator=generator, dtype=torch.float64)
    parts = {name: layer.get_parameter(name) for name in layer.part_names}
    wanted = x @ _matrix(kind, parts, layer.weight, AdapterConfig(kind=kind, rank=RANK).scale).t()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *(parts[name] for name in KINDS_TRAINED[kind])]
    expected = torch.autograd.grad(wanted, leaves, upstream)
    found = torch.autograd.grad(layer(x), leaves, upstream)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_matrix_alone(kind: str) -> None:
    layer = _adapted(kind)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(layer.merged(layer.weight), layer.weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_same_matrix(kind: str) -> None:
    layer = _moved(_adapted(kind))
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(x @ layer.merged(layer.weight).t(), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(kind: str) -> None:
    layer = _adapted(kind)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == set(KINDS_TRAINED[kind])


def test_pissa_begins_with_the_largest_singular_vectors() -> None:
    layer = _adapted("pissa", alpha=12.0)
    left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
    largest = left[:, :RANK] * values[:RANK] @ right[:RANK]
    torch.testing.assert_close(3.0 * layer.lora_B @ layer.lora_A, largest, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer.lora_A, layer.first_A)


def test_dropout_is_of_the_update_alone_and_only_in_training() -> None:
    layer = _moved(_adapted("lora", dropout=0.5))
    x = torch.ones(64, IN, dtype=torch.float64)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.merged(layer.weight).t())
    with torch.no_grad():
        layer.lora_B.zero_()
    torch.testing.assert_close(layer.train()(x), x @ layer.weight.t())
