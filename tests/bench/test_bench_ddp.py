"""The bench of strategies: its theory, its tables, its refusals, and a real run whose allocations follow the theory."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rwkv_cluster.bench import ddp, ddp_exchange
from rwkv_cluster.bench.ddp_memory import KINDS
from rwkv_cluster.errors import ConfigError, LaunchError
from rwkv_cluster.train.memory.model_states import theory
from rwkv_cluster.train.optimizers.table import ADAMW

TINY = "--n-layer 2 --n-embd 32 --head-size 16 --ctx-len 32 --micro-bsz 2 --ds-bucket-mb 1".split()  # noqa: SIM905
QUICK = [*TINY, *"--steps 1 --warmup 1 --repeats 1".split()]  # noqa: SIM905


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_per_parameter"),
    [  # weights, gradients, masters, moments of one of four ranks
        (None, "fp32", (4, 4, 0, 8)),
        (0, "fp32", (4, 4, 0, 8)),
        (0, "bf16", (4, 4, 0, 8)),
        (1, "fp32", (4, 4, 1, 2)),
        (2, "fp32", (4, 1, 1, 2)),
        (3, "fp32", (1, 1, 1, 2)),
        (1, "bf16", (2, 2, 1, 2)),
        (2, "bf16", (2, 0.5, 1, 2)),
        (3, "bf16", (0.5, 0.5, 1, 2)),
    ],
)
def test_theory(stage: int | None, precision: str, bytes_per_parameter: tuple[float, ...]) -> None:
    found = theory(1000, 4, stage, precision, ADAMW)
    kinds = ("weights", "gradients", "masters", "moments")
    assert found == {kind: 1000 * size for kind, size in zip(kinds, bytes_per_parameter, strict=True)}


def _figures(
    step_s: float,
    held: dict[str, int],
    overlap: dict[str, float] | None = None,
    network: dict[str, float] | None = None,
) -> dict[str, Any]:
    return {
        "parameters": 1_000_000,
        "parameters_kept_whole": 10_000,
        "step_s": [step_s],
        "losses": [5.0, 4.0],
        "held": {kind: held.get(kind, 0) for kind in KINDS},
        "peak_mb": 300.0,
        "exchange": {"all_reduce": {"calls": 3, "n_bytes": 4_000_040, "sent": 4_000_040.0}},
        "overlap": overlap,
        "network": network,
    }


def _overlap(seconds: float, alone: float = 0.2) -> dict[str, float]:
    return {"with_s": seconds, "without_s": 0.95 * seconds, "alone_s": alone * seconds}


def test_ratios_are_of_the_same_turn_and_every_rank_counts() -> None:
    settings = vars(ddp.parser().parse_args(["--micro-bsz", "2", "--ctx-len", "100"]))
    sharded = [{"moments": 4_000_000, "whole": 40_000}, {"moments": 5_000_000}]
    turns = [
        {
            ("ddp", 2): [_figures(seconds, {"moments": 8_000_000}, _overlap(seconds, 0.02), _overlap(seconds))] * 2,
            ("deepspeed_stage_3", 2): [_figures(2 * seconds, held) for held in sharded],
            ("single", 1): [_figures(1.0, {})],
            ("ddp", 1): [_figures(1.0, {})],
        }
        for seconds in (1.0, 4.0)  # the machine became slower
    ]
    result = ddp._summary(settings, turns)
    assert json.loads(json.dumps(result)) == result
    plain, stage_3, single, lone = result["cases"]
    assert plain["overlap"]["with_s"] == {"min": 1.0, "median": 2.5, "max": 4.0}
    assert plain["network"]["hidden"] == pytest.approx({"min": 0.75, "median": 0.75, "max": 0.75})
    assert stage_3["overlap"] is None
    assert lone["network"] is None
    assert plain["tokens_per_s"] == {"min": 100.0, "median": 250.0, "max": 400.0}
    assert stage_3["ratio"] == {"min": 0.5, "median": 0.5, "max": 0.5}
    assert single["ratio"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert stage_3["bytes"]["moments"] == {"measured": 5_000_000, "theory": 4_000_000, "ratio": 1.25}
    assert stage_3["bytes"]["whole"] == {"measured": 40_000, "theory": 40_000, "ratio": 1.0}
    assert plain["bytes"]["masters"] == {"measured": 0, "theory": 0, "ratio": None}
    assert plain["bytes"]["buckets"] == {"measured": None, "theory": None, "ratio": None}
    assert stage_3["bytes"]["buckets"] == {"measured": 0, "theory": 4_000_000, "ratio": 0}
    lines = ddp.format(result).splitlines()
    assert "1,000,000 parameters, fp32, cpu" in lines[0]
    assert lines[3].split() == "2 deepspeed_stage_3 125 50 200 5.000 0.50 0.50 0.50 300".split()  # noqa: SIM905
    assert lines[4].split() == "1 single 200 200 200 1.000 1.00 1.00 1.00 300".split()  # noqa: SIM905
    memory, exchange = [line for line in lines[5:] if "deepspeed_stage_3" in line]
    assert exchange.split() == "2 deepspeed_stage_3 3 4.00 4.00".split()  # noqa: SIM905
    (number,) = [number for number, line in enumerate(lines) if line.endswith("75%")]
    assert lines[number].split() == "a network 2.500 2.375 0.500 75%".split()  # noqa: SIM905
    assert lines[number - 1].split() == ["2", "ddp", "3", "4.00", "4.00", "2.500", "2.375", "0.050", "-"]
    assert "5.00 / 4.00" in memory
    assert "0.04 / 0.04" in memory


def test_collectives_are_counted_with_what_a_ring_sends() -> None:
    events = [
        ("c10d::allreduce_", [[]], ["TensorList"]),
        ("gloo:all_reduce", [[1000, 2]], ["float"]),
        ("gloo:all_reduce", [[500]], ["c10::BFloat16"]),
        ("nccl:_all_gather_base", [[30]], ["double"]),
        ("nccl:reduce_scatter", [[40]], ["c10::Half"]),
        ("gloo:barrier", [], []),
        ("aten::mul", [[9], [9]], ["float", "float"]),
    ]
    found = ddp_exchange.collectives(
        [SimpleNamespace(name=name, input_shapes=shapes, input_dtypes=dtypes) for name, shapes, dtypes in events], 4
    )
    assert found == {
        "all_reduce": {"calls": 2, "n_bytes": 9000, "sent": 13_500.0},
        "all_gather_base": {"calls": 1, "n_bytes": 240, "sent": 720.0},
        "reduce_scatter": {"calls": 1, "n_bytes": 80, "sent": 60.0},
        "barrier": {"calls": 1, "n_bytes": 0, "sent": 0.0},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "0"], "--ranks is 0, .*>= 1"),
        (["--warmup", "0"], "--warmup is 0, .*>= 1"),
        (["--timeout-s", "nan"], "--timeout-s is nan, .*> 0"),
        (["--vocab-size", "1"], "--vocab-size is 1, .*>= 2"),
        (["--strategies", "single", "--ranks", "2"], "--strategies single .*--ranks 1"),
        (["--n-embd", "48", "--head-size", "32"], "n_embd"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ddp.run(arguments)


@pytest.mark.slow
@pytest.mark.system
def test_two_ranks_hold_what_theory_says() -> None:
    strategies = ["ddp", "deepspeed_stage_1", "deepspeed_stage_3"]
    result = ddp.run([*QUICK, "--ranks", "2", "--strategies", *strategies])
    cases = {case["strategy"]: case for case in result["cases"]}
    assert list(cases) == strategies
    for case in cases.values():
        assert case["loss"] == pytest.approx(cases["ddp"]["loss"], rel=1e-6)
        assert case["ratio"]["median"] > 0
        assert case["bytes"]["weights"]["ratio"] == pytest.approx(1, rel=0.05)
    for strategy in strategies[1:]:
        for kind in ("masters", "moments", "buckets"):  # of as many elements as the model has, not of 1 M
            assert cases[strategy]["bytes"][kind]["ratio"] == pytest.approx(1, rel=0.05), (strategy, kind)
    assert cases["ddp"]["bytes"]["gradients"]["ratio"] == pytest.approx(1, rel=0.05)
    assert cases["ddp"]["bytes"]["moments"]["ratio"] == pytest.approx(1, rel=0.05)
    assert cases["deepspeed_stage_3"]["bytes"]["gradients"]["ratio"] == pytest.approx(1, rel=0.05)
    assert ddp.format(result).count("deepspeed_stage_3") == 3


@pytest.mark.system
def test_two_ranks_say_what_they_exchange_and_what_of_it_is_hidden() -> None:
    result = ddp.run([*QUICK, "--ranks", "2", "--strategies", "ddp"])
    (case,) = result["cases"]
    reduced = case["exchange"]["all_reduce"]
    assert reduced["calls"] >= 2  # the gradients, and one small exchange of losses and votes
    trained = case["bytes"]["gradients"]["measured"]
    assert trained < reduced["n_bytes"] < trained + 1000
    assert reduced["sent"] == reduced["n_bytes"]  # of two ranks each sends half of it twice
    overlap = case["overlap"]
    assert all(overlap[name]["median"] > 0 for name in ("with_s", "without_s", "alone_s"))
    assert overlap["hidden"]["median"] < math.inf
    assert case["network"]["alone_s"]["median"] >= overlap["without_s"]["median"] / 2  # it takes what it is to take


class Sleeping(torch.autograd.Function):
    """A layer without work whose backward pass takes `seconds` and no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, torch.zeros_like(ctx.saved_tensors[0]), None


class SleepingLayers(nn.Module):
    """Four of them, each with a bucket's worth of parameters."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(300_000)) for _ in range(4)])
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = Sleeping.apply(x, weight, self.seconds)
        return x


@pytest.mark.system
@pytest.mark.parametrize(
    ("network_s", "is_waited_for", "hidden"),
    [
        (0.05, False, 3 / 4),  # as fast as the layers: all but the last bucket
        (0.10, False, 3 / 8),  # half as fast: the time of three layers, of four times 0.1 s
        (0.05, True, 0.0),
    ],
)
def test_hidden_share_of_a_network_that_takes_no_core(network_s: float, is_waited_for: bool, hidden: float) -> None:
    network = ddp_exchange.Network(network_s / 1_200_000)

    def send(bucket: Tensor) -> torch.futures.Future[Tensor]:
        future = network.reduce(bucket)
        if is_waited_for:
            future.wait()
        return future

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(SleepingLayers(0.05), bucket_cap_mb=1)
        model.register_comm_hook(None, lambda _, bucket: send(bucket.buffer()))
        x = torch.zeros((), requires_grad=True)
        for _ in range(3):  # DDP assigns its buckets after the first pass
            model(x).backward()
        overlap = ddp_exchange.measure_overlap(model, x, 3, network.reduce)
    finally:
        dist.destroy_process_group()
    assert overlap.alone_s == pytest.approx(4 * network_s, rel=0.2)
    assert overlap.hidden == pytest.approx(hidden, abs=0.12)


@pytest.mark.system
def test_a_contender_that_takes_too_long_ends_the_bench() -> None:
    with pytest.raises(LaunchError, match=r"single on 1 rank\(s\) took more than 0.1 s. Raise --timeout-s"):
        ddp.run([*QUICK, "--strategies", "single", "--ranks", "1", "--timeout-s", "0.1"])
