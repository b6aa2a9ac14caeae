"""The folder of an adapter as Hugging Face's peft reads it, under native names or those of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.adapters.table import KINDS
from rwkv_cluster.config import AdapterConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.interchange.export.publish import Part, files_of, publish, same_files
from rwkv_cluster.interchange.export.safetensors_writer import Sink, Slot, header_bytes, write_safetensors
from rwkv_cluster.interchange.export.tokenizer_files import json_file
from rwkv_cluster.interchange.export.write import Exported
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.model.weights_file import check_finite

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "rwkv_base.sha256"
"""Key of the base's fingerprint in the metadata of the tensors."""
LAYOUTS_BY_FORMAT = {"peft": None, "peft-fla": LAYOUTS["fla"]}
"""Layout of the names by `--format`; None: native ones."""


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter.

    Attributes:
        adapter: its configuration.
        parts: its tensors, by name as in `table.adapter_shapes`.
        model_type: version of the model that it belongs to.
        base: fingerprint of the weights that it belongs to.
        base_name: what `base_model_name_or_path` says of them.
    """

    adapter: AdapterConfig
    parts: Mapping[str, Tensor]
    model_type: str
    base: str
    base_name: str


def write_folder(
    trained: TrainedAdapter, format_name: str, output: Path, *, source_sha256: str, force: bool = False
) -> Exported:
    """Write the folder. force: replace one of that name that has another content.

    Raises ConfigError where the layout does not exist for the model, or something else has that name; CheckpointError
    where the disk refuses.
    """
    parts = folder_parts(trained, format_name)
    there = None if force else same_files(output, parts)
    files = publish(output, parts) if there is None else there
    return Exported(
        path=output,
        format=format_name,
        dtype="fp32",
        source_sha256=source_sha256,
        files=files,
        n_bytes=sum(each.stat().st_size for each in files_of(output).values()),
        notes=(),
        already_there=there is not None,
    )


def folder_parts(trained: TrainedAdapter, format_name: str) -> list[Part]:
    """The files of the folder, the tensors in fp32.

    Raises ConfigError where the layout does not know the model, CheckpointError where a value is not finite.
    """
    check_finite(trained.parts, "not exported")
    layout = LAYOUTS_BY_FORMAT[format_name]
    if layout is not None and trained.model_type not in layout.versions:
        raise ConfigError(
            f"{format_name} exists for {', '.join(layout.versions)}, and the model is {trained.model_type}",
            remedy="Use --format peft, which has native names",
        )
    formulas = KINDS[trained.adapter.kind].functions()
    tensors: dict[str, Tensor] = {}
    settings: Mapping[str, object] = {}
    modules = []
    for native, own in _by_matrix(trained.parts).items():
        module = native
        if layout is not None:
            place = layout.to_other(f"{native}.weight")
            assert place is not None
            module = place[0].removesuffix(".weight")
        modules.append(module)
        values = {name: tensor.detach().float().cpu() for name, tensor in own.items()}
        in_peft = formulas.in_peft(values, trained.adapter)
        settings = in_peft.settings
        tensors |= {f"{PREFIX}{module}.{name}": tensor for name, tensor in in_peft.tensors.items()}
    config = {
        **settings,
        "task_type": "CAUSAL_LM",
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": trained.base_name,
    }
    return [_small_part(CONFIG, json_file(config)), _tensors_part(tensors, trained.base)]


def _by_matrix(parts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parts of each matrix, by its module's name and their own."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


def _tensors_part(tensors: Mapping[str, Tensor], base: str) -> Part:
    slots = [Slot(name, tuple(tensor.shape), torch.float32) for name, tensor in tensors.items()]
    metadata = {"format": "pt", BASE: base}

    def write(sink: Sink) -> None:
        write_safetensors(sink, slots, tensors.values(), metadata)

    return Part(TENSORS, header_bytes(slots, metadata) + sum(slot.n_bytes for slot in slots), write)


def _small_part(name: str, content: bytes) -> Part:
    def write(sink: Sink) -> None:
        sink.write(content)

    return Part(name, len(content), write)
