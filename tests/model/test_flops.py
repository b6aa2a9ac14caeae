"""Operations against torch's own counter, parameters against the model's, device names as CUDA spells them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VERSIONS
from torch.utils.flop_counter import FlopCounterMode

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.kernels.sizes import OPERATORS
from rwkv_cluster.model.flops import flops_per_token
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import version_of
from rwkv_cluster.runtime.gpu_specs import GPUS, find_gpu, gpu_of_device

BATCH, TIME = 2, 8
BY_PRODUCTS = {
    "x052": 2,
    "x060": 2,
    "x070": 4,
}  # of an operator's flops_per_state_element, what the time loop does with bmm
SHAPES = {
    "narrow": {"n_layer": 3, "n_embd": 64, "head_size_a": 16, "vocab_size": 100},
    "wide": {"n_layer": 2, "n_embd": 384, "head_size_a": 64, "vocab_size": 1000},
    "ranks": {"n_layer": 2, "n_embd": 96, "head_size_a": 32, "vocab_size": 65, "decay_lora_rank": 24,
              "mix_lora_rank": 20, "a_lora_rank": 17, "v_lora_rank": 9, "gate_lora_rank": 40},
}  # fmt: skip


def counted(config: ModelConfig, *, grad_cp: bool = False) -> dict[str, int]:
    """torch's count for a token of one forward and backward pass in float64, which takes the plain way everywhere."""
    model = RWKV(config, wkv_backend="reference", fused="plain", grad_cp=grad_cp).double()
    initialize(model, seed=0)
    tokens = torch.randint(0, 60, (BATCH, TIME + 1))
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model, tokens).backward()
    totals = counter.get_flop_counts()["Global"]
    return {str(operator): total // (BATCH * TIME) for operator, total in totals.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_products_are_those_that_torch_counts(model_type: str, shape: str) -> None:
    """Exactly. Of WKV the counter sees the products alone: decay and outer products are elementwise to it.

    And one product less in the whole backward pass: the state before the first token needs no gradient.
    """
    config = ModelConfig(model_type=model_type, **SHAPES[shape])
    ours, theirs = flops_per_token(config), counted(config)
    wkv = theirs.pop("aten.bmm")
    assert sum(theirs.values()) == 3 * (ours.blocks + ours.head)
    products = 3 * TIME * BY_PRODUCTS[model_type] / 2
    operator = OPERATORS[version_of(config).operator]
    share = BY_PRODUCTS[model_type] / operator.flops_per_state_element * (products - 1) / products
    assert wkv == pytest.approx(3 * ours.wkv * share, rel=1e-12)


@pytest.mark.parametrize("model_type", VERSIONS)
def test_the_total_is_near_the_counters_and_near_six_n(model_type: str) -> None:
    """5 %: what the counter leaves out of WKV, and what 6 N leaves out or takes for a product."""
    config = ModelConfig(model_type=model_type, **SHAPES["wide"])
    ours = flops_per_token(config)
    assert ours.training == pytest.approx(sum(counted(config).values()), rel=0.05)
    assert ours.six_n == pytest.approx(ours.training, rel=0.07)


def test_checkpointing_computes_the_blocks_twice() -> None:
    """The counter sees what is recomputed; WKV's share of it as above."""
    config = ModelConfig(model_type="x052", **SHAPES["wide"])
    once, twice = counted(config), counted(config, grad_cp=True)
    ours = flops_per_token(config)
    more = {name: twice[name] - once[name] for name in once}
    assert more.pop("aten.bmm") == pytest.approx(ours.wkv * 2 / 5)
    # the last product of a block is not repeated: torch stops recomputing when it has what backward needs
    assert sum(more.values()) == pytest.approx(ours.blocks, rel=0.25)
    assert ours.hardware(grad_cp=True) - ours.hardware(grad_cp=False) == ours.blocks + ours.wkv


def test_a_vocabulary_has_to_come_from_somewhere() -> None:
    model = ModelConfig(n_embd=64)
    assert flops_per_token(model, vocab_size=50).head == 2 * 50 * 64
    with pytest.raises(ConfigError, match=r"model.vocab_size is not set. Set it"):
        flops_per_token(model)


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
    ],
)
def test_device_names(device_name: str, name: str | None) -> None:
    assert gpu_of_device(device_name) == (GPUS[name] if name else None)


def test_an_unknown_gpu_gets_the_nearest_name() -> None:
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(ConfigError, match=r"--gpu is 'h100-sxm'.* Nearest: h100"):
        find_gpu("h100-sxm")
