"""The GPU benchmarks' own logic, on a CPU in place of the device: nothing is timed here that anyone would believe."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_cluster.bench import cuda_step, cuda_wkv, step, wkv
from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels import native
from rwkv_cluster.model.rwkv import RWKV


class WallClock:
    def __call__(self, work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cuda_wkv, "Timer", WallClock)
    monkeypatch.setattr(cuda_wkv, "copy_bandwidth", lambda timed: 3e12)
    monkeypatch.setattr(native, "wkv7_forward", lambda inputs, kernel: time.sleep(1e-3 * kernel))
    monkeypatch.setattr(cuda_wkv, "SHAPES", {"small": (2, 40, 128), "tiny": (2, 20, 128)})


def wkv_options(*arguments: str) -> argparse.Namespace:
    options = wkv._parser().parse_args(["--versions", "wkv7", "wkv5", "--repeats", "2", *arguments])
    options.shapes, options.dtype, options.batch, options.time, options.width = ["small", "tiny"], "float32", 2, 40, 128
    return options


@pytest.mark.system
@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_contender_that_fails_while_it_is_timed_leaves_the_others_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turn, turns = cuda_wkv._turn, []

    def runs_out(version: str, backend: str, *rest: Any) -> tuple[float, float]:
        turns.append(backend)
        if backend == "chunked" and len(turns) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB")
        return turn(version, backend, *rest)

    monkeypatch.setattr(cuda_wkv, "_turn", runs_out)
    options = wkv_options("--output", str(tmp_path / "found.json"))
    result = cuda_wkv.run(options, wkv._inputs)
    assert [(case["version"], case["shape"]) for case in result["cases"]] == [
        ("wkv7", "small"), ("wkv7", "tiny"), ("wkv5", "small"), ("wkv5", "tiny")
    ]  # fmt: skip
    for case in result["cases"]:
        ours, chunked, fla = (case["contenders"][name] for name in ("native", "chunked", "fla"))
        assert ours["both_s"] > 0
        assert ours["error"] < 1e-4
        assert chunked["refused"].startswith("CUDA out of memory")
        assert "needs a GPU" in fla["refused"]
        assert list(case["forms"]) == (["16 steps", "32 steps"] if case["version"] == "wkv7" else [])
        assert all(seconds > 0 for seconds in case["forms"].values())
    assert json.loads((tmp_path / "found.json").read_text()) == result
    assert "CUDA out of memory" in cuda_wkv.format(result)
    assert "wkv7 small native, 32 steps between barriers: forward" in cuda_wkv.format(result)


@pytest.mark.system
@pytest.mark.usefixtures("cpu_as_gpu")
def test_what_was_measured_before_the_end_is_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = cuda_wkv._case

    def interrupted(version: str, options: argparse.Namespace, *rest: Any) -> dict[str, Any]:
        if version == "wkv5":
            raise KeyboardInterrupt
        return case(version, options, *rest)

    monkeypatch.setattr(cuda_wkv, "_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cuda_wkv.run(wkv_options("--output", str(tmp_path / "found.json")), wkv._inputs)
    kept = json.loads((tmp_path / "found.json").read_text())
    assert [case["version"] for case in kept["cases"]] == ["wkv7", "wkv7"]


@pytest.mark.parametrize("place", ["last head", "last row", "a row and head between", "late steps", "u"])
def test_a_wrong_value_anywhere_is_noticed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "wkv6" if place == "u" else "wkv7"
    options = wkv_options()
    options.batch, options.time, options.width, options.head_size = 3, 150, 48, 16
    inputs, dy = wkv._inputs(version, options)
    assert cuda_wkv._error(version, "chunked", inputs, dy) < 1e-4
    where = {
        "last head": (0, 0, 2),
        "last row": (2, 0, 0),
        "a row and head between": (1, 0, 1),
        "late steps": (0, 140, 0),
    }
    right = cuda_wkv._operator

    def wrong(version: str, backend: str) -> cuda_wkv.Operator:
        operator = right(version, backend)

        def compute(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if place == "u":
                given = (*given[:-1], given[-1].roll(1, 0))
            y, state = operator(*given)
            if place in where:
                row, first, head = where[place]
                y = y.clone()
                y[row, first:, head] *= 2
            return y, state

        return operator if backend == "exact" else compute

    monkeypatch.setattr(cuda_wkv, "_operator", wrong)
    assert cuda_wkv._error(version, "chunked", inputs, dy) > cuda_wkv.LARGEST_ERROR


@pytest.mark.system
@pytest.mark.usefixtures("cpu_as_gpu")
def test_steps_of_every_preset_are_measured_and_a_failure_costs_its_own_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        cuda_step,
        "PRESETS",
        {"fits": (2, 64, 2), "half fits": (4, 64, 1), "too large": (2, 64, 1), "breaks": (1, 64, 1)},
    )
    monkeypatch.setattr(cuda_step, "VOCAB_SIZE", 300)
    measure = cuda_step._measure

    def limited(n_layer: int, n_embd: int, batch: int, grad_cp: int, options: argparse.Namespace) -> dict[str, Any]:
        case = len(caplog.records) // 2
        if (case == 1 and n_layer > 2) or case == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        if case == 3:
            raise ValueError("no such luck\nand more")
        return measure(n_layer, n_embd, batch, grad_cp, options)

    monkeypatch.setattr(cuda_step, "_measure", limited)
    options = step.parser().parse_args(["--repeats", "1", "--gpu-ctx-len", "16", "--output", str(tmp_path / "s.json")])
    options.presets = list(cuda_step.PRESETS)
    with caplog.at_level("INFO", "rwkv_cluster"):
        result = cuda_step.run(options)
    found = result["cases"]
    assert [found[name]["n_layer"] for name in ("fits", "fits grad_cp", "half fits", "half fits grad_cp")] == [
        2,
        2,
        2,
        2,
    ]
    assert found["fits"]["mfu"] > 0
    predicted = found["half fits grad_cp"]["predicted_s"]
    assert predicted["total"] > found["half fits"]["predicted_s"]["total"], "its forward pass is made once more"
    assert found["too large"] == found["too large grad_cp"] == {"error": "does not fit"}
    assert found["breaks"] == {"error": "ValueError: no such luck"}
    assert json.loads((tmp_path / "s.json").read_text()) == result
    assert all(name in step.format(result) for name in found)


def test_weights_of_the_benchmark_are_finite_and_those_of_an_initialised_model_where_that_is_cheap() -> None:
    config = ModelConfig(model_type="x070", n_layer=2, n_embd=64, ctx_len=16, vocab_size=300)
    model = RWKV(config)
    cuda_step._fill(model)
    values = dict(model.named_parameters())
    assert all(torch.isfinite(value).all() for value in values.values())
    assert values["blocks.0.att.output.weight"].std() > 0.01
    assert torch.equal(values["blocks.1.ln1.weight"], torch.ones(64))
    assert torch.allclose(values["blocks.0.att.k_a"], torch.full((1, 1, 64), 1.02))
