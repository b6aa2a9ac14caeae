"""Files of a state that a model begins from: `blocks.<layer>.att.time_state` [H,N,N] each, indexed [value, key].

These are RWKV-PEFT's names and RWKV-Runner's order of axes, of every version: Runner gives RWKV-7's to the `rwkv`
package as they are and transposes those before. A file that also has the token shifts (`att.shift_state`,
`ffn.shift_state` [C]) goes on where a conversation was; only this package reads these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.interchange.read import read_tensors
from rwkv_cluster.model.own_state import file_shapes, set_own_state
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import check_finite, save_pth

_WKV, _SHIFT = ".time_state", ".shift_state"


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state atomically, in fp32. tensors: under the names of files. Raises CheckpointError."""
    save_pth(path, tensors, torch.float32)


def load_state(model: RWKV, path: Path) -> None:
    """Let `model` begin from the state of a file, .pth or safetensors.

    Raises MissingCheckpointError where there is none, CheckpointError for a file of anything else, or of a state of
    another model.
    """
    tensors = read_tensors(path)
    # beside a whole model's tensors only the state counts
    state = {name: tensor for name, tensor in tensors.items() if name.endswith((_WKV, _SHIFT))}
    if not any(name.endswith(_WKV) for name in state):
        raise CheckpointError(
            f"{path}: it has no tensors blocks.*.att{_WKV}, so it is no state",
            remedy="Name a file of state tuning, or one that /save of chat has written",
        )
    expected = file_shapes(model, with_shifts=any(name.endswith(_SHIFT) for name in state))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != expected:
        raise CheckpointError(f"{path}: {_difference(shapes, expected)}", remedy="Name the model that it was made for")
    check_finite(state, f"{path}: the state is not usable")
    set_own_state(model, {name: state[name] for name in expected})


def _difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What a state has that is not the model's, in words."""
    layers, wanted = (sum(name.endswith(_WKV) for name in names) for names in (found, expected))
    if layers != wanted:
        return f"it is a state of {layers} layers, and the model has {wanted}"
    name = next(name for name in (*expected, *found) if found.get(name) != expected.get(name))
    if name not in found or name not in expected:
        return f"it has no {name}" if name in expected else f"it has {name}, which is no part of the model's state"
    return f"{name} is {found[name]}, and the model's state {expected[name]}"
