"""Weights files and folders as other programs leave them, made from native tensors by the table of layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import Tensor

from rwkv_cluster.interchange.layouts import LAYOUTS, Reshape

RANKS = {"decay_lora_rank": 8, "a_lora_rank": 16, "v_lora_rank": 24, "gate_lora_rank": 40}


def four_ranks() -> dict[str, Tensor]:
    """Weights of two layers of RWKV-7, 128 wide, with a different rank for each LoRA and nothing that is not used."""
    return tiny_model("x070", n_embd=128, head_size_a=32, block0_value_residual=False, **RANKS).state_dict()


def in_layout(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Tensors under the names and in the shapes of a layout; "native" leaves them as they are."""
    if layout == "native":
        return dict(weights)
    renamed = {}
    for native, tensor in weights.items():
        entry = LAYOUTS[layout].to_other(native)
        if entry is not None:
            other, reshape = entry
            shape = reshape.outward(tuple(tensor.shape))
            renamed[other] = (tensor.t() if reshape is Reshape.TRANSPOSE else tensor.reshape(shape)).contiguous()
    return renamed


def write_folder(folder: Path, tensors: Mapping[str, Tensor], *, n_files: int = 1) -> Path:
    """A folder of safetensors: one file, or several and their index."""
    folder.mkdir(parents=True)
    if n_files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names, places = list(tensors), {}
    for number in range(n_files):
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::n_files]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(found[name], tensor), name
