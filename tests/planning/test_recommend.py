"""What fits, and the smallest change where the configured setting does not: checkpointing, batch, stage, offload."""

from __future__ import annotations

import pytest

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.planning.recommend import change, needed, shardings
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import MemoryModel, Setting

MODEL = ModelConfig(model_type="x070", n_layer=24, n_embd=2048, ctx_len=4096, vocab_size=65536)
KERNELS = Kernels("cuda", "tensor_cores", "compile")
MEMORY = MemoryModel(MODEL, 65536, TrainingConfig(precision="bf16"), KERNELS)
CONFIGURED = Setting(Sharding(8), grad_cp=False, micro_bsz=4)
BF16 = TrainingConfig(precision="bf16")


def _bytes(setting: Setting) -> float:
    return needed(MEMORY.memory(setting))


def test_the_cheapest_change_comes_first() -> None:
    checkpointed = Setting(Sharding(8), True, 4)
    smaller = Setting(Sharding(8), True, 2, accumulates=True)
    assert change(MEMORY, CONFIGURED, _bytes(CONFIGURED)) == CONFIGURED
    assert change(MEMORY, CONFIGURED, _bytes(CONFIGURED) - 1) == checkpointed
    assert change(MEMORY, CONFIGURED, _bytes(checkpointed) - 1) == smaller


def test_stages_come_before_offloading_and_with_the_largest_batch_that_fits() -> None:
    no_size = min(_bytes(Setting(Sharding(8), True, size, accumulates=size < 4)) for size in (1, 2, 4))
    found = change(MEMORY, CONFIGURED, no_size - 1)
    assert found is not None
    assert (found.sharding, found.grad_cp, found.micro_bsz) == (Sharding(8, 1), True, 4)
    no_stage = min(
        _bytes(Setting(Sharding(8, stage), True, size, accumulates=size < 4))
        for stage in (None, 1, 2, 3)
        for size in (1, 2, 4)
    )
    offloading = change(MEMORY, CONFIGURED, no_stage - 1)
    assert offloading is not None
    assert offloading.sharding.offload_optimizer


def test_nothing_fits_a_tiny_gpu() -> None:
    assert change(MEMORY, CONFIGURED, 2e9) is None


def test_one_rank_has_nobody_to_share_with() -> None:
    alone = Setting(Sharding(1), True, 1)
    found = change(MEMORY, alone, _bytes(alone) - 1)
    assert found is not None
    assert found.sharding.offload_optimizer


def test_only_what_may_be_configured_is_listed() -> None:
    assert shardings(4, TrainingConfig(precision="fp16")) == [Sharding(4)]
    in_8_bits = TrainingConfig(precision="bf16", optimizer="adamw8bit", adam_eps=1e-8)
    assert shardings(4, in_8_bits) == [Sharding(4), Sharding(4, 0)]
    fields = [TrainingConfig(precision="bf16", zero_stage=s.stage, offload_optimizer=s.offload_optimizer,
                             offload_parameters=s.offload_parameters) for s in shardings(4, BF16)]  # fmt: skip
    assert [Sharding.of(training, 4) for training in fields] == shardings(4, BF16)


@pytest.mark.parametrize("grad_cp", [False, True])
def test_more_of_anything_needs_more(grad_cp: bool) -> None:
    sizes = [_bytes(Setting(Sharding(8), grad_cp, size)) for size in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    for first, second in zip(
        shardings(8, BF16)[2::2],
        shardings(8, BF16)[4::2],
        strict=False,
    ):
        assert _bytes(Setting(second, grad_cp, 4)) <= _bytes(Setting(first, grad_cp, 4))
