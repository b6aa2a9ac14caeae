"""What a rank keeps of the state of training: DeepSpeed's own estimators, a recorded bench, and a real optimizer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import VERSIONS, some_tokens, tiny_model, tiny_model_config

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.model.loss import next_token_loss
from rwkv_cluster.model.parameter_shapes import count, parameter_shapes
from rwkv_cluster.train.memory.model_states import Sharding, model_states
from rwkv_cluster.train.optimizers.param_groups import build_optimizer, optimizer_tensors
from rwkv_cluster.train.optimizers.table import ADAMW

RECORDED = Path(__file__).parents[3] / "kernels/benchmarks/ddp-cpu-2026-11-26.json"
SHAPES = parameter_shapes(ModelConfig(model_type="x052", n_layer=24, n_embd=1024, vocab_size=65536), 65536)
BUCKET = 1  # elements; DeepSpeed's estimators leave buckets out


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_estimators(stage: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters, moments and fp32 gradients: what offloading takes off a GPU of theirs. 5 %."""
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as of_stage_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as of_stage_2

    P = count(SHAPES)
    ours = model_states(SHAPES, Sharding(ranks, stage), "bf16", BUCKET, ADAMW)
    if stage == 2:
        kept = of_stage_2(P, ranks, 1, cpu_offload=False)[1] - of_stage_2(P, ranks, 1, cpu_offload=True)[1]
        kept -= ours.gradients  # which theirs counts beside the fp32 copy
    else:
        kept = of_stage_3(P, 0, ranks, 1, cpu_offload=False)[1]
        kept -= of_stage_3(P, 0, ranks, 1, cpu_offload=True, cpu_offload_params=False)[1]
    assert ours.masters + ours.moments + ours.gradient_copy == pytest.approx(kept, rel=0.05)
    weights = of_stage_2(P, ranks, 1, cpu_offload=True)[1] if stage == 2 else 2 * P / ranks
    assert ours.weights == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize("ranks", [4, 8])
def test_deepspeeds_estimator_of_the_hosts_memory(ranks: int) -> None:
    """Of a node: theirs has 16 bytes for each parameter, ours also the updated parameters on their way back."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as of_stage_2

    P = count(SHAPES)
    host = ranks * model_states(SHAPES, Sharding(ranks, 2, offload_optimizer=True), "bf16", BUCKET, ADAMW).host
    theirs = of_stage_2(P, ranks, 1, cpu_offload=True, additional_buffer_factor=1)[0]
    assert theirs == 16 * P if ranks == 4 else theirs > 16 * P
    assert host == pytest.approx(18 * P, rel=0.05)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_0", "deepspeed_stage_1", "deepspeed_stage_2",
                                      "deepspeed_stage_3"])  # fmt: skip
def test_what_the_recorded_bench_has_allocated(strategy: str, ranks: int) -> None:
    """5 %, of allocations on a CPU after a backward pass. Stage 1 has by then freed what other ranks update."""
    record = json.loads(RECORDED.read_text())
    (case,) = [case for case in record["cases"] if (case["strategy"], case["ranks"]) == (strategy, ranks)]
    model = ModelConfig(model_type="x070", n_layer=6, n_embd=256, head_size_a=64, vocab_size=256)
    shapes = parameter_shapes(model, 256)
    assert count(shapes) == record["parameters"]
    stage = None if strategy == "ddp" else int(strategy[-1])
    ours = model_states(shapes, Sharding(ranks, stage), "fp32", 200_000_000, ADAMW)
    measured = {kind: row["measured"] for kind, row in case["bytes"].items()}
    for kind in ("weights", "masters", "moments"):
        assert getattr(ours, kind) == pytest.approx(measured[kind], rel=0.05), kind
    if stage != 1:
        assert ours.gradients == pytest.approx(measured["gradients"], rel=0.05)
    if stage == 3:
        assert ours.gathered >= measured["whole"]


@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_real_optimizer(model_type: str) -> None:
    """Exactly: parameters that are not trained have no gradient and no moments."""
    config = tiny_model_config(model_type)
    model = tiny_model(model_type)
    optimizer = build_optimizer(model, config.model_type, TrainingConfig(precision="fp32"))
    next_token_loss(model, some_tokens(2, 9)).backward()
    optimizer.step()
    ours = model_states(parameter_shapes(config, 50), Sharding(1), "fp32", BUCKET, ADAMW)
    assert ours.weights == sum(p.nbytes for p in model.parameters())
    assert ours.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert ours.moments == sum(tensor.nbytes for tensor in optimizer_tensors(optimizer).values())


def test_a_rank_alone_gathers_what_its_host_has() -> None:
    alone, moved, of_eight = (
        model_states(SHAPES, sharding, "bf16", 1000, ADAMW)
        for sharding in (Sharding(1, 3, True), Sharding(1, 3, True, True), Sharding(8, 3))
    )
    assert alone.gathered == 0
    assert moved.gathered == of_eight.gathered > 0


def test_stages_keep_less_and_offloading_moves_it() -> None:
    whole, one, two, three = (
        model_states(SHAPES, Sharding(8, stage), "bf16", 1000, ADAMW) for stage in (None, 1, 2, 3)
    )
    assert whole.gradients == 2 * one.gradients == 16 * two.gradients
    assert two.weights == 8 * three.weights
    assert one.buckets == two.buckets == 2 * three.buckets == 2 * 2 * 1000
    small = parameter_shapes(ModelConfig(n_layer=1, n_embd=64, vocab_size=50), 50)
    assert model_states(small, Sharding(8, 3), "fp32", 10**9, ADAMW).buckets == 4 * count(small)
    assert (whole.keeps_gradients, one.keeps_gradients, three.keeps_gradients) == (True, False, True)
    moved = model_states(SHAPES, Sharding(8, 3, True, True), "bf16", 1000, ADAMW)
    assert (moved.weights, moved.masters, moved.moments, moved.gradients) == (0, 0, 0, 0)
    assert moved.host == pytest.approx(three.weights + 18 * count(SHAPES) / 8)


def test_a_configuration_names_its_sharding() -> None:
    training = TrainingConfig(precision="bf16", strategy="deepspeed_stage_3_offload")
    sharding = Sharding.of(training, 4)
    assert sharding == Sharding(4, 3, True, True)
    assert replace(sharding, offload_parameters=False).overrides == [
        "training.zero_stage=3",
        "training.offload_optimizer=true",
    ]
    assert Sharding.of(TrainingConfig(), 1) == Sharding(1)
