"""Header of a safetensors file: which tensors it holds, of which shape and dtype. Torch-free, and milliseconds.

The format: 8 bytes of the header's length (little endian), the header in JSON, the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.recognise import MAX_HEADER_BYTES

LENGTH_BYTES = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, by the dtype's name in a header. Weights have no other dtype."""
_QUANTISED = ("I8", "U8", "F8", "F6", "F4", "I4", "U4")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor's entry in a header. dtype: one of ITEM_BYTES."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of a safetensors file, by name.

    Raises CheckpointError for a file that is truncated or damaged, as far as its header tells, or quantised.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > MAX_HEADER_BYTES:
                raise _damaged(path, "it does not begin with the length of a header")
            header = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(header) < length:
        raise _damaged(path, f"its header has {length:,} bytes, and the file ends after {len(header):,} of them")
    entries = _entries(path, header)
    entries.pop("__metadata__", None)
    records, end = {}, 0
    for name, (record, begins, ends) in _sorted(path, entries):
        if begins != end:
            raise _damaged(path, f"the bytes of {name!r:.80} begin at {begins:,}, expected {end:,}")
        records[name], end = record, ends
    there = size - LENGTH_BYTES - length
    if there != end:
        raise _damaged(path, f"its tensors have {end:,} bytes, and {there:,} are there")
    return {name: records[name] for name in entries}


def _entries(path: Path, header: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) < len(pairs):
            raise ValueError("a name stands in it twice")
        return fields

    try:
        entries = json.loads(header, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error!s:.80})") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no JSON object")
    return entries


def _sorted(path: Path, entries: dict[str, Any]) -> list[tuple[str, tuple[TensorRecord, int, int]]]:
    """Tensors in the order of their bytes, each with where these begin and end."""
    found = [(name, _parsed(path, name, entry)) for name, entry in entries.items()]
    return sorted(found, key=lambda item: item[1][1:])


def _parsed(path: Path, name: str, entry: Any) -> tuple[TensorRecord, int, int]:
    try:
        dtype, shape, (begins, ends) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the entry of {name!r:.80} lacks its dtype, shape or data_offsets") from None
    if any(not isinstance(number, int) or number < 0 for number in (*shape, begins, ends)):
        raise _damaged(path, f"the entry of {name!r:.80} has numbers that are no sizes")
    if dtype not in ITEM_BYTES:
        if str(dtype).startswith(_QUANTISED):
            raise CheckpointError(
                f"{path}: {name!r:.80} is quantised to {dtype!s:.20}", remedy="Use weights in bf16, fp16 or fp32"
            )
        raise CheckpointError(f"{path}: {name!r:.80} has dtype {dtype!s:.20}, expected floats: {', '.join(ITEM_BYTES)}")
    if ends - begins != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(path, f"{name!r:.80} of shape {shape} and dtype {dtype} has {ends - begins:,} bytes")
    return TensorRecord(dtype, shape), begins, ends


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated: {what}", remedy="Download or copy it again")
