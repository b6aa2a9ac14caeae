"""The parts of a profile: by hand for a step on a CPU and one on a GPU, and for any trace they add up to the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_cluster.train.metrics.profile_breakdown import PARTS, PHASE, break_down, part_of

BACKWARD = "autograd::engine::evaluate_function: "


def _call(name: str, begin: float, end: float, *, thread: int = 1, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": thread, "ts": begin, "dur": end - begin, "args": args}


def _marked(name: str, begin: float, end: float) -> dict[str, Any]:
    return _call(name, begin, end, cat="user_annotation")


def _step(*phases: tuple[str, float, float]) -> list[dict[str, Any]]:
    return [_marked("ProfilerStep#3", 0, 100), *(_marked(PHASE + name, begin, end) for name, begin, end in phases)]


def _parts(events: list[dict[str, Any]]) -> dict[str, float]:
    """In the microseconds of the trace, without parts of nothing."""
    found = break_down(events)
    assert sum(found.parts_s.values()) == pytest.approx(found.whole_s)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert tuple(found.parts_s) == PARTS
    return {part: round(seconds * 1e6, 6) for part, seconds in found.parts_s.items() if seconds}


def test_a_step_on_a_cpu() -> None:
    events = [
        *_step(("data", -5, 10), ("forward", 10, 40), ("backward", 40, 80), ("optimizer", 80, 95), ("other", 95, 120)),
        _call("aten::layer_norm", 11, 12),
        _call("_Fp32Linear", 12, 21),
        _call("aten::copy_", 12, 13),
        _call("mkldnn::_linear_pointwise", 13, 20),
        _call("rwkv_cluster::wkv7", 21, 26),
        _call("aten::bmm", 22, 24),
        _call("_HeadLoss", 30, 38),
        _call("aten::mm", 32, 37),
        _call(f"{BACKWARD}_HeadLossBackward", 41, 43),
        _call(f"{BACKWARD}_Wkv7Backward", 44, 50),
        _call("_Wkv7Backward", 45, 49),
        _call("aten::bmm", 46, 47),
        _call(f"{BACKWARD}MmBackward0", 50, 60),
        _call("aten::mm", 51, 59),
        _call("gloo:all_reduce", 55, 70, thread=2, cat="user_annotation"),  # 60 to 70 is waited for
        _call("aten::add_", 66, 67),  # by this much less
        _call("aten::mm", 200, 300),  # after the step
    ]
    assert _parts(events) == {
        "data": 10,
        "forward": 30 - 7 - 5 - 8,
        "matmul": 7 + 5 + 8,
        "WKV": 5 + 6,
        "loss": 3 + 2,
        "communication": 9,
        "backward": 40 - 2 - 6 - 8 - 9,
        "optimizer": 15,
        "other": 5,
    }
    assert break_down(events).busy is None


def test_a_step_on_a_gpu() -> None:
    """Kernels run later than what launched them, also when the step is over; autograd has its own thread."""

    def launch(at: float, correlation: int, thread: int = 1) -> dict[str, Any]:
        return _call("cudaLaunchKernel", at, at + 1, thread=thread, cat="cuda_runtime", correlation=correlation)

    def kernel(name: str, begin: float, end: float, correlation: int, cat: str = "kernel") -> dict[str, Any]:
        return _call(name, begin, end, thread=7, cat=cat, correlation=correlation)

    events = [
        *_step(("data", 0, 5), ("forward", 5, 20), ("backward", 20, 60), ("optimizer", 60, 90), ("other", 90, 100)),
        _call("aten::copy_", 1, 4),
        launch(2, 1),
        kernel("Memcpy HtoD", 3, 8, 1, "gpu_memcpy"),
        _call("aten::mm", 6, 9),
        launch(7, 2),
        kernel("ampere_gemm", 10, 30, 2),
        _call("rwkv_cluster::wkv7", 10, 14),
        launch(11, 3),
        kernel("forward_kernel<64>", 30, 36, 3),
        launch(16, 4),  # from code that torch.compile made
        kernel("triton_poi_fused_0", 36, 39, 4),
        _call(f"{BACKWARD}MulBackward0", 22, 30, thread=2),
        launch(24, 5, thread=2),
        kernel("elementwise", 40, 44, 5),
        _call("aten::mm", 32, 36, thread=2),
        launch(33, 6, thread=2),
        kernel("ampere_gemm", 44, 60, 6),
        _call("c10d::allreduce_", 40, 44, thread=2),
        launch(41, 7, thread=2),
        kernel("ncclDevKernel_AllReduce", 50, 70, 7),  # beside the product, which costs no time of the whole
        launch(62, 8),
        kernel("multi_tensor_apply", 70, 110, 8),
        kernel("of the step before", 0, 2, 99),
        _call("ncclDevKernel", 50, 70, thread=7, cat="gpu_user_annotation"),
    ]
    assert _parts(events) == {
        "data": 5,
        "matmul": 20 + 16,
        "WKV": 6,
        "forward": 3,
        "backward": 4,
        "communication": 20,
        "optimizer": 40,
    }
    found = break_down(events)
    assert found.whole_s == pytest.approx(114e-6)
    assert found.wall_s == pytest.approx(100e-6)
    assert found.busy == pytest.approx(0.96)  # it is idle from 2 to 3, 8 to 10 and 39 to 40


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("rwkv_cluster::wkv6_backward", "WKV"),
        ("GeneratedBackwardFor_rwkv_cluster_wkv7_defaultBackward", "WKV"),
        ("_Wkv6", "WKV"),
        ("aten::_to_copy", None),
        ("aten::addmm", "matmul"),
        ("aten::baddbmm_", "matmul"),
        (f"{BACKWARD}MmBackward0", None),  # checkpointing computes a whole block in one
        ("aten::mul", None),
        ("nccl:all_reduce", "communication"),
        ("record_param_comms", "communication"),
        ("_HeadLoss", "loss"),
        (f"{PHASE}eval", "other"),
        (f"{PHASE}data", "data"),
    ],
)
def test_what_a_name_tells(name: str, part: str | None) -> None:
    assert part_of(name) == part


NAMES = ("aten::mul", "aten::mm", "_HeadLoss", "rwkv_cluster::wkv7", "c10d::allreduce_", f"{PHASE}backward")


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(-20, 120), st.integers(1, 60), st.integers(1, 2))))
def test_parts_add_up_whatever_the_trace(calls: list[tuple[str, int, int, int]]) -> None:
    """Also where calls overlap without one containing the other, as a profiler's clock may have it."""
    events = _step() + [_call(name, begin, begin + length, thread=thread) for name, begin, length, thread in calls]
    assert sum(_parts(events).values()) == pytest.approx(100)


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        break_down([_call("aten::mm", 0, 1)])
