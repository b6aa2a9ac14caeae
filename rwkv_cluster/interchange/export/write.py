"""Weights as a file or folder of another program, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import torch
from torch import Tensor

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.interchange.export.format import ExportedModel, Format
from rwkv_cluster.interchange.export.publish import Part, files_of, publish, same_files
from rwkv_cluster.interchange.export.safetensors_writer import (
    INDEX,
    Sink,
    Slot,
    header_bytes,
    shards,
    write_safetensors,
)
from rwkv_cluster.interchange.export.table import FORMATS
from rwkv_cluster.interchange.export.tokenizer_files import json_file
from rwkv_cluster.interchange.layouts import Reshape
from rwkv_cluster.model.parameter_shapes import parameter_shapes, unused_names
from rwkv_cluster.model.weights_file import check_finite

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 5_000_000_000  # as the readers' own programs write them


class TensorsByName(Protocol):
    """Tensors under native names, each read when it is asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """Weights to export.

    Attributes:
        path: the file or checkpoint that they are in.
        tensors: under native names.
        outlines: the same as tensors of the device meta, in the order of the file.
        config: sizes, as `infer_model_config` finds them in `outlines`.
        label: what default names of exports begin with, such as "step-00001000".
        folder: where exports go by default.
        digest: sha256, hexadecimal, of the file, of the checkpoint's manifest, or of the digests of several files.
        dtype: a key of DTYPES, of the export where none is asked for; None: the tensors' own.
        world_vocabulary: see ExportedModel.
        hub_tokenizer: see ExportedModel.
        ctx_len: see ExportedModel.
    """

    path: Path
    tensors: TensorsByName
    outlines: Mapping[str, Tensor]
    config: ModelConfig
    label: str
    folder: Path
    digest: str
    dtype: str | None = None
    world_vocabulary: bytes | None = None
    hub_tokenizer: bytes | None = None
    ctx_len: int | None = None


@dataclass(frozen=True)
class Exported:
    """What was written, or was there already. files: sha256 by name. n_bytes: of all of them."""

    path: Path
    format: str
    dtype: str
    source_sha256: str
    files: Mapping[str, str]
    n_bytes: int
    notes: tuple[str, ...]
    already_there: bool


def export(
    source: Source,
    format: Format,
    *,
    dtype: str | None = None,
    output: Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the weights in a format to `output`, by default in the source's folder under a name of its own.

    dtype: a key of DTYPES. force: replace an export of that name that has another content.
    Raises ConfigError where the format does not exist for the model, or something else has that name; CheckpointError
    where a value is not finite, or the disk refuses.
    """
    _require_version(source.config, format)
    _require_whole(source)
    chosen = _dtype(source, format, dtype)
    model = ExportedModel(
        source.config,
        chosen or _own_dtype(source),
        world_vocabulary=source.world_vocabulary,
        hub_tokenizer=source.hub_tokenizer,
        ctx_len=source.ctx_len,
    )
    companions = format.companions(model)
    path = output or source.folder / f"{source.label}{format.suffix}"
    if source.path.exists() and path.exists() and path.samefile(source.path):
        raise ConfigError(f"{path} is what would be exported", remedy="Name another --output")
    tensors = _Renamed(source, format, DTYPES[chosen] if chosen else None)
    if format.container == "pth":
        parts = [Part("", tensors.n_bytes, tensors.write_pth)]
    elif format.container == "safetensors":
        parts = [tensors.safetensors_part("", tensors.slots)]
    else:
        groups = list(shards(tensors.slots, shard_bytes))
        small = dict(companions.files) | ({INDEX: _index(groups)} if len(groups) > 1 else {})
        parts = [tensors.safetensors_part(name, group) for name, group in groups]
        parts += [_small_part(name, content) for name, content in small.items()]
    there = None if force else same_files(path, parts)
    files = publish(path, parts) if there is None else there
    return Exported(
        path=path,
        format=format.name,
        dtype=model.dtype,
        source_sha256=source.digest,
        files={name or path.name: digest for name, digest in files.items()},
        n_bytes=sum(each.stat().st_size for each in files_of(path).values()),
        notes=companions.notes,
        already_there=there is not None,
    )


class _Renamed:
    """The tensors of a source under a format's names, in its shapes and in `dtype` (None: as they are)."""

    def __init__(self, source: Source, format: Format, dtype: torch.dtype | None) -> None:
        self._source = source
        self._metadata = {"format": "pt", "source_sha256": source.digest}
        self._natives: dict[str, tuple[str, Reshape]] = {}
        self.slots: list[Slot] = []
        for native, outline in source.outlines.items():
            if place := format.rename(native):
                name, reshape = place
                self._natives[name] = native, reshape
                self.slots.append(Slot(name, reshape.outward(tuple(outline.shape)), dtype or outline.dtype))

    @property
    def n_bytes(self) -> int:
        """Bytes of all values."""
        return sum(slot.n_bytes for slot in self.slots)

    def write_pth(self, sink: Sink) -> None:
        """Give a .pth to a sink. torch.save wants all tensors at once: those that change are in memory together."""
        torch.save({slot.name: self._value(slot) for slot in self.slots}, cast(IO[bytes], sink))

    def safetensors_part(self, name: str, slots: list[Slot]) -> Part:
        """The file of these tensors, of which one is in memory at a time."""
        n_bytes = header_bytes(slots, self._metadata) + sum(slot.n_bytes for slot in slots)

        def write(sink: Sink) -> None:
            write_safetensors(sink, slots, map(self._value, slots), self._metadata)

        return Part(name, n_bytes, write)

    def _value(self, slot: Slot) -> Tensor:
        """One tensor as the export has it. Raises CheckpointError for a value that is not finite, here or there."""
        native, reshape = self._natives[slot.name]
        tensor = self._source.tensors[native].detach()
        check_finite({native: tensor}, "not exported")
        converted = tensor.to(slot.dtype)
        if converted.dtype != tensor.dtype and not converted.isfinite().all():
            raise CheckpointError(
                f"not exported: {native} has a value too large for {slot.dtype}", remedy="Choose --dtype bf16 or fp32"
            )
        if reshape is Reshape.TRANSPOSE:
            converted = converted.transpose(-1, -2)
        elif reshape is Reshape.FLATTEN:
            converted = converted.flatten()
        # a copy where it is part of a larger buffer: torch.save would store all of that
        is_whole = converted.is_contiguous() and converted.untyped_storage().nbytes() == converted.nbytes
        return converted if is_whole else converted.clone(memory_format=torch.contiguous_format)


def _require_version(config: ModelConfig, format: Format) -> None:
    if config.model_type not in format.versions:
        there = [each.name for each in FORMATS.values() if config.model_type in each.versions]
        raise ConfigError(
            f"no program reads {config.model_type} as {format.name}",
            remedy=f"Formats of {config.model_type}: {', '.join(there)}",
        )


def _require_whole(source: Source) -> None:
    """Raise CheckpointError unless the tensors are those of a whole model and nothing else."""
    unused, rows = unused_names(), source.config.vocab_size
    assert rows is not None
    found = {name: tuple(outline.shape) for name, outline in source.outlines.items() if name not in unused}
    shapes = parameter_shapes(source.config, rows)
    wanted = {name: shape for name, shape in shapes.items() if name not in unused}
    if different := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        name = different[0]
        is_there = list(found[name]) if name in found else "not there"
        expected = list(wanted[name]) if name in wanted else "no such tensor"
        raise CheckpointError(
            f"the weights are not those of a whole {source.config.model_type} model: {name} is {is_there}, expected "
            f"{expected}",
            remedy="Name the weights of a model",
        )


def _dtype(source: Source, format: Format, wanted: str | None) -> str | None:
    if format.dtype and wanted not in (None, format.dtype):
        raise ConfigError(
            f"--dtype is {wanted}, and {format.name} exists in {format.dtype} only", remedy="Leave --dtype out"
        )
    return format.dtype or wanted or source.dtype


def _own_dtype(source: Source) -> str:
    own = source.outlines["emb.weight"].dtype
    return next((name for name, dtype in DTYPES.items() if dtype == own), "fp32")


def _small_part(name: str, content: bytes) -> Part:
    def write(sink: Sink) -> None:
        sink.write(content)

    return Part(name, len(content), write)


def _index(groups: Iterable[tuple[str, list[Slot]]]) -> bytes:
    """Content of INDEX."""
    places = [(slot, name) for name, group in groups for slot in group]
    content = {
        "metadata": {"total_size": sum(slot.n_bytes for slot, _ in places)},
        "weight_map": {slot.name: name for slot, name in places},
    }
    return json_file(content)
