"""Safetensors files written tensor by tensor, which `safetensors.torch.save_file` does not: it wants all at once.

The format: the header's length as u64, the header as JSON (name -> dtype, shape, first and last byte), the values.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rwkv_cluster.interchange import read

INDEX = read.FOLDER_FILES[0] + read.INDEX
"""Which shard has which tensor."""
_DTYPE_NAMES = {dtype: name for name, dtype in read.DTYPES.items()}
_ALIGNMENT = 8  # of the first value, so that readers can map the file


class Sink(Protocol):
    """What bytes are written to: a file, or a digest of one."""

    def write(self, content: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    sink: Sink, slots: Sequence[Slot], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a whole file. tensors: in the order of `slots`, with their shapes and dtypes; one is held at a time."""
    sink.write(_header(slots, metadata))
    for tensor in tensors:
        sink.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def header_bytes(slots: Sequence[Slot], metadata: Mapping[str, str]) -> int:
    """Bytes of a file before its values."""
    return len(_header(slots, metadata))


def shards(slots: Sequence[Slot], limit: int) -> Iterator[tuple[str, list[Slot]]]:
    """(File name, its tensors in order), so that no file's values exceed `limit` bytes unless one tensor's do."""
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if groups[-1] and filled + slot.n_bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled += slot.n_bytes
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        yield name, group


def is_shard_name(name: str) -> bool:
    """Whether `shards` gives such names."""
    return re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for slot in slots:
        start, end = end, end + slot.n_bytes
        dtype = _DTYPE_NAMES[slot.dtype]
        entries[slot.name] = {"dtype": dtype, "shape": list(slot.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
