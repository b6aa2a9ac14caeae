"""ctypes' view of the C interface: csrc/wkv.h, structure and functions."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

ABI = 5
"""RWKV_KERNELS_ABI of a library that fits."""

CUDA_ERROR = 1000
"""RWKV_CUDA_ERROR: a status from here on is CUDA's own, counted from this."""

NO_MEMORY = (4, 1002)
"""Statuses of a function that has found no memory: RWKV_NO_MEMORY, RWKV_CUDA_ERROR + cudaErrorMemoryAllocation."""


class Problem(ctypes.Structure):
    """rwkv_problem."""

    _fields_ = (
        ("batch", c_int64),
        ("time", c_int64),
        ("heads", c_int64),
        ("size", c_int64),
        ("io", c_int32),
        ("kernel", c_int32),
        ("threads", c_int32),
        ("constant_decay", c_int32),
        ("stream", c_void_p),
        ("starts", c_void_p),
    )


class Logits(ctypes.Structure):
    """rwkv_logits of csrc/loss.h."""

    _fields_ = (
        ("rows", c_int64),
        ("vocabulary", c_int64),
        ("stride", c_int64),
        ("io", c_int32),
        ("gradient", c_int32),
        ("l2wrap", c_float),
        ("stream", c_void_p),
    )


class Rows(ctypes.Structure):
    """rwkv_rows of csrc/fused.h."""

    _fields_ = (
        ("rows", c_int64),
        ("time", c_int64),
        ("width", c_int64),
        ("size", c_int64),
        ("io", c_int32),
        ("threads", c_int32),
        ("stream", c_void_p),
        ("starts", c_void_p),
    )


_PROBLEM = POINTER(Problem)
_ROWS = POINTER(Rows)


def _on_tensors(count: int) -> tuple[Any, list[Any]]:
    return c_int32, [_PROBLEM, *[c_void_p] * count]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "rwkv_kernels_abi": (c_int32, []),
    "rwkv_kernels_target": (c_char_p, []),
    "rwkv_status_text": (c_char_p, [c_int32]),
    "rwkv_saved_bytes": (c_int64, [c_int32, _PROBLEM]),
    "rwkv_wkv7_forward": _on_tensors(10),
    "rwkv_wkv7_backward": _on_tensors(16),
    "rwkv_wkv6_forward": _on_tensors(9),
    "rwkv_wkv6_backward": _on_tensors(14),
}
"""Result and argument types of the functions that every library exports."""

ONLY_SOME: dict[str, tuple[Any, list[Any]]] = {
    "rwkv_mix_forward": (c_int32, [_ROWS, c_int32, *[c_void_p] * 3]),
    "rwkv_mix_backward": (c_int32, [_ROWS, c_int32, *[c_void_p] * 5]),
    "rwkv_norm_mix_forward": (c_int32, [_ROWS, c_int32, c_int32, *[c_void_p] * 8]),
    "rwkv_norm_mix_backward": (c_int32, [_ROWS, c_int32, c_int32, *[c_void_p] * 9]),
    "rwkv_squared_relu_forward": (c_int32, [_ROWS, *[c_void_p] * 2]),
    "rwkv_squared_relu_backward": (c_int32, [_ROWS, *[c_void_p] * 3]),
    "rwkv_prepare_forward": (c_int32, [_ROWS, *[c_void_p] * 2]),
    "rwkv_prepare_backward": (c_int32, [_ROWS, *[c_void_p] * 3]),
    "rwkv_read_forward": (c_int32, [_ROWS, *[c_void_p] * 7]),
    "rwkv_read_backward": (c_int32, [_ROWS, *[c_void_p] * 12]),
    "rwkv_shift_blend_forward": (c_int32, [_ROWS, *[c_void_p] * 4]),
    "rwkv_shift_blend_backward": (c_int32, [_ROWS, *[c_void_p] * 7]),
    "rwkv_sigmoid_gate_forward": (c_int32, [_ROWS, *[c_void_p] * 3]),
    "rwkv_sigmoid_gate_backward": (c_int32, [_ROWS, *[c_void_p] * 5]),
    "rwkv_gated_norm_forward": (c_int32, [_ROWS, *[c_void_p] * 5]),
    "rwkv_gated_norm_backward": (c_int32, [_ROWS, *[c_void_p] * 8]),
    "rwkv_softmax_loss": (c_int32, [POINTER(Logits), *[c_void_p] * 3]),
    "rwkv_select_target": (c_int32, [c_char_p]),
    "rwkv_host_schedule": (None, [ctypes.c_uint32]),
}
"""Functions of some libraries: the CPU's, CUDA's, or the one that runs CUDA sources on a CPU."""
