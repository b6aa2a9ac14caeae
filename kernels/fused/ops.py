"""What a block computes beside its matrix products and WKV, in few passes over memory: three forms and their choice.

    plain     PyTorch's operators one by one (`fused.reference`): the definition
    native    the compiled libraries (`fused.native`), for float32, bfloat16, float16, widths that are multiples of 16
              and, on a GPU, head sizes that are powers of two up to 256
    compile   the plain form under torch.compile, which needs Triton, a C compiler and Python's headers on a GPU, and a
              C++ compiler on a CPU
    auto      native where it serves; else, on a GPU with what it needs and in training, compile; else plain

What a form does not serve goes the plain way. Legend: B batch, T time, H heads, N head size, C = H N.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.fused import native
from rwkv_cluster.kernels.fused import reference as plain
from rwkv_cluster.kernels.fused.reference import Prepared
from rwkv_cluster.kernels.native import find_library
from rwkv_cluster.kernels.sizes import has_norm_mix

CHOICES = ("auto", "plain", "native", "compile")
"""Accepted values of `choice`."""

VARIANTS = 256
"""Forms of one function that torch.compile may make in a process: one for each width, dtype and number of mixes."""


def require(choice: str, device_type: str) -> None:
    """Raise KernelError for a choice that `device_type` ("cpu" or "cuda") cannot have here."""
    if choice == "native" and isinstance(library := find_library(torch.device(device_type)), loader.Missing):
        raise KernelError(f'{library.reason} training.fused "native" needs them; "auto" takes what there is.')
    if choice == "compile" and (missing := missing_for_compile(device_type)):
        raise KernelError(f'training.fused "compile" needs {missing}, which is not here; "auto" takes what there is.')


def has_native(device_type: str) -> bool:
    """Whether the library for `device_type` ("cpu" or "cuda") is here."""
    return isinstance(find_library(torch.device(device_type)), loader.Library)


def is_native(x: Tensor, choice: str) -> bool:
    """Whether passes over x [..,C] take the native form under `choice`; for others a model may have a cheaper way."""
    return _form(choice, x) == "native"


def mix(
    x: Tensor, mixes: Sequence[Tensor], starts: Tensor | None = None, *, choice: str = "auto"
) -> tuple[Tensor, ...]:
    """Token shift: x + (x one step earlier - x) * m for each m of `mixes`; zeros come before a sequence.

    Args:
        x: [B,T,C].
        mixes: 1 to 6 parameters of C elements.
        starts: bool [B,T], true where a document begins, before which zeros come too; nowhere when None.
        choice: one of CHOICES.
    """
    form = _form(choice, x)
    if form == "native":
        return native.mix(x, mixes, starts)
    result: tuple[Tensor, ...] = _plain(plain.mix, form)(x, mixes, starts)
    return result


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor | None],
    starts: Tensor | None = None,
    *,
    choice: str = "auto",
) -> tuple[Tensor, ...]:
    """Residual sum, layer norm, token shift and mixes: x + branch, and `mix` of h, its layer norm with eps 1e-5.

    Without a native form, for other numbers of mixes than 1, 2, 4 and 6 and on a GPU for more than 2560 channels, the
    token shift still has its own.

    Args:
        x, branch: [B,T,C]; x alone where the branch is None.
        weight, bias: [C], the norm's.
        mixes: parameters of C elements, or None for h itself, before which nothing is mixed.
        starts: as in `mix`.
        choice: one of CHOICES.

    Returns:
        x + branch, and one [B,T,C] for each of the mixes.
    """
    form = _form(choice, x)
    if form == "native" and has_norm_mix(x.device.type, x.shape[-1], len(mixes)):
        return native.norm_mix(x, branch, weight, bias, mixes, starts)
    if form == "native":
        return plain.norm_mix(x, branch, weight, bias, mixes, starts, partial(mix, choice=choice))
    result: tuple[Tensor, ...] = _plain(plain.norm_mix, form)(x, branch, weight, bias, mixes, starts)
    return result


def blend(x: Tensor, delta: Tensor, mixes: Sequence[Tensor], *, choice: str = "auto") -> tuple[Tensor, ...]:
    """x + delta * m for each m of `mixes`, [B,T,C] or parameters of C elements; x, delta [B,T,C]. No native form."""
    result: tuple[Tensor, ...] = _plain(plain.blend, _form_without_native(choice, x))(x, delta, mixes)
    return result


def shift_blend(
    x: Tensor,
    mixes: Sequence[Tensor],
    constants: Sequence[Tensor],
    starts: Tensor | None = None,
    *,
    choice: str = "auto",
) -> tuple[Tensor, ...]:
    """Token shift of RWKV-6: x + (x one step earlier - x) * (m + c) for each m, c of `mixes` and `constants`.

    Args:
        x: [B,T,C].
        mixes: five [B,T,C], computed from the data.
        constants: as many parameters of C elements.
        starts: bool [B,T], true where a document begins, before which zeros come as before a sequence; or None.
        choice: one of CHOICES.
    """
    form = _form(choice, x)
    if form == "native":
        return native.shift_blend(x, mixes, constants, starts)
    result: tuple[Tensor, ...] = _plain(plain.shift_blend, form)(x, mixes, constants, starts)
    return result


def sigmoid_gate(gate: Tensor, value: Tensor, *, choice: str = "auto") -> Tensor:
    """sigmoid(gate) * value, the output of the channel mix of RWKV-5 and 6; all [B,T,C]."""
    form = _form(choice, value)
    if form == "native":
        return native.sigmoid_gate(gate, value)
    result: Tensor = _plain(plain.sigmoid_gate, form)(gate, value)
    return result


def squared_relu(x: Tensor, *, choice: str = "auto") -> Tensor:
    """relu(x)^2, the activation of every channel mix; x [B,T,C]."""
    form = _form(choice, x)
    if form == "native":
        return native.squared_relu(x)
    result: Tensor = _plain(plain.squared_relu, form)(x)
    return result


def prepare(
    r: Tensor,
    k: Tensor,
    a: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    v_mix: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    *,
    choice: str = "auto",
) -> Prepared:
    """RWKV-7's pass before WKV, with kappa the per-head unit vector along k k_k and rate = sigmoid(a + a0).

    k (1 + (rate - 1) k_a), -kappa, kappa rate, v + (v_first - v) sigmoid(v_mix + v0), and the sum over a head of r_k r
    times that k.

    Args:
        r, k, v: [B,T,C].
        a, v_mix: [B,T,C] before their sigmoids and biases.
        v_first: [B,T,C] of block 0, in which v_first, v_mix and v0 are None.
        k_k, k_a, a0, v0: C elements.
        r_k: [H,N].
        choice: one of CHOICES.
    """
    arguments = (r, k, a, v, v_first, v_mix, k_k, k_a, r_k, a0, v0)
    form = _form(choice, k, r_k.shape[-1])
    return Prepared(*(native.prepare if form == "native" else _plain(plain.prepare, form))(*arguments))


def gated_readout(
    y: Tensor, v: Tensor, bonus: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, choice: str = "auto"
) -> Tensor:
    """RWKV-7's reading of WKV's output: (head norm of y, with weight and bias, + bonus v) * gate.

    y [B,T,H,N]; v, gate [B,T,C]; bonus [B,T,H]; weight, bias [C]. Returns [B,T,C].
    """
    form = _form(choice, gate, y.shape[-1])
    if form == "native":
        return native.gated_readout(y, v, bonus, gate, weight, bias)
    result: Tensor = _plain(plain.gated_readout, form)(y, v, bonus, gate, weight, bias)
    return result


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, choice: str = "auto") -> Tensor:
    """The reading of RWKV-5 and 6: head norm of y, with weight and bias, times silu(gate).

    y [B,T,H,N]; gate [B,T,C]; weight, bias [C]. Returns [B,T,C].
    """
    form = _form(choice, gate, y.shape[-1])
    if form == "native":
        return native.gated_norm(y, gate, weight, bias)
    result: Tensor = _plain(plain.gated_norm, form)(y, gate, weight, bias)
    return result


def _form(choice: str, x: Tensor, size: int | None = None) -> str:
    """The form that x [..,C] gets: native, compile or plain. size: N, in a pass over heads."""
    may_be_native = choice in ("auto", "native") and not torch.compiler.is_compiling()
    return "native" if may_be_native and native.serves(x, size) else _form_without_native(choice, x)


def _form_without_native(choice: str, x: Tensor) -> str:
    """The form that x gets where there is no native one: compile or plain."""
    if choice == "plain" or torch.compiler.is_compiling():
        return "plain"
    if choice == "compile":
        return "compile"
    # Sampling has a new length with every prompt, each of which would be compiled.
    if choice == "native" or x.device.type == "cpu" or not torch.is_grad_enabled():
        return "plain"
    if missing := missing_for_compile(x.device.type):
        _tell(missing)
        return "plain"
    return "compile"


@cache
def missing_for_compile(device_type: str) -> str | None:
    """What torch.compile lacks here for "cpu" or "cuda", e.g. "a C compiler"; None where it can compile.

    Triton builds the driver stub of its kernels with a C compiler, against Python's headers, when the first one runs.
    """
    if device_type != "cuda":
        return None if any(shutil.which(name) for name in ("c++", "g++", "clang++")) else "a C++ compiler"
    if importlib.util.find_spec("triton") is None:
        return "Triton"
    chosen = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([chosen] if chosen else ["gcc", "clang"])):
        return "a C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h"
    return None


@cache
def _tell(missing: str) -> None:
    """Say once in a process why the passes are not compiled."""
    logging.getLogger("rwkv_cluster").warning(
        "torch.compile needs %s, which is not here. Until then what a block computes between its products runs in "
        "plain PyTorch, more slowly.",
        missing,
    )


def _plain(function: Callable[..., Any], form: str) -> Callable[..., Any]:
    """The plain form, which also serves where there is no native one, or it under torch.compile."""
    return _compiled(function) if form == "compile" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    config = importlib.import_module("torch._dynamo.config")
    for name in ("recompile_limit", "accumulated_recompile_limit"):  # with fullgraph, one more variant is an error
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), VARIANTS))
    # On a GPU the sizes of reductions are else chosen by measuring, and each choice may add in another order: a run
    # that goes on elsewhere, or with an emptied cache, would differ in the last bits.
    exists = hasattr(importlib.import_module("torch._inductor.config"), "deterministic")
    return torch.compile(function, fullgraph=True, options={"deterministic": True} if exists else None)
