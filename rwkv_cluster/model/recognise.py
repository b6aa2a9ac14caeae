"""Kinds of files that were named as weights and hold none: by first bytes, an archive's names, tensors' names.

Each sentence says what it is and what to do, and nothing of the file is run. This module does not need torch.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from rwkv_cluster.errors import CheckpointError, MissingCheckpointError

HEAD_BYTES = 512
ZIP = b"PK\x03\x04"
_UNPACK = "Unpack it and name the .pth that is in it"
_ORIGINAL = "Use the .pth that it was made from, in bf16, fp16 or fp32"
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a Git LFS pointer and not the weights", "Run `git lfs pull` where it was cloned"),
    b"GGUF": ("a GGUF file", _ORIGINAL),
    b"ggml": ("a GGML file", _ORIGINAL),
    b"lmgg": ("a GGML file", _ORIGINAL),
    b"fmgg": ("a GGML file", _ORIGINAL),
    b"tjgg": ("a GGML file", _ORIGINAL),
    b"\x1f\x8b": ("compressed with gzip", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed with xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x93NUMPY": ("a NumPy array", "Name an RWKV .pth"),
    b"\x89HDF": ("an HDF5 file", "Name an RWKV .pth"),
    b"PAR1": ("a Parquet file: data, not weights", "Name it in data.inputs once it is JSONL, and an RWKV .pth here"),
    b"MMIDIDX": ("the index of a token file", "Name an RWKV .pth"),
    b"%PDF": ("a PDF document", "Name an RWKV .pth"),
    b"\x7fELF": ("a program", "Name an RWKV .pth"),
}
_PAGE = re.compile(rb"\s*(<!doctype|<html|<\?xml|<head|<body)", re.IGNORECASE)
_DOWNLOAD = "Download the file itself: on Hugging Face from /resolve/, not /blob/"
_NOT_MERGED = re.compile(r"(^|[._])(lora|dora|bone|disha|pissa)($|[._])", re.IGNORECASE)
_NESTED = ("state_dict", "model_state_dict", "model", "module", "weights", "params")


def require_weights_file(path: Path) -> None:
    """Raise MissingCheckpointError or CheckpointError unless a file is there that begins as torch.save's do."""
    if not path.exists():
        raise MissingCheckpointError(f"{path}: no such weights file", remedy="Check the path")
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a weights file", remedy="Name the .pth that is in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file", remedy="Name a weights file")
    try:
        with open(path, "rb") as handle:
            head = handle.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith(ZIP):
        return
    if head[:1] == b"\x80":
        raise CheckpointError(
            f"{path}: refused: it has the pickle format from before torch 1.6, which cannot be verified",
            remedy="Load it in an environment you trust and save it again with torch.save",
        )
    what, remedy = _kind(head, path.stat().st_size) or (None, "")
    if what is None:
        raise CheckpointError(f"{path}: not a weights file: starts with {head[:4]!r}, wanted {ZIP!r}")
    raise CheckpointError(f"{path}: it is {what}", remedy=remedy)


def _kind(head: bytes, size: int) -> tuple[str, str] | None:
    """(Kind of a file with these first bytes and this size, what to do); None for an unknown one."""
    if size == 0:
        return "empty", "Download or save it again"
    if not head.strip(b"\0"):
        return "zeros where the weights should be: a download or copy that was cut off", "Download or save it again"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if _PAGE.match(head):
        return "a web page (HTML), not the weights", _DOWNLOAD
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if size > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] + 8 <= size:
        program = "import sys, torch, safetensors.torch as s; torch.save(s.load_file(sys.argv[1]), sys.argv[2])"
        return "a safetensors file", f'Convert it: python -c "{program}" IN OUT.pth'
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON, not the weights: maybe the answer of a server that refused the download", _DOWNLOAD
    return None


def archive_fault(archive: zipfile.ZipFile) -> str | None:
    """What a zip archive is that torch.save has not made, and what to do; None for one that it may have made."""
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names) or any("/code/" in name for name in names):
        return "it is a TorchScript archive. Save the tensors alone: torch.save(model.state_dict(), path)"
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "it is NumPy's .npz. Save its arrays as tensors: torch.save({name: torch.from_numpy(array)}, path)"
    if any(name.endswith((".pth", ".pt", ".safetensors")) for name in names):
        return f"it is a zip archive with a weights file in it. {_UNPACK}"
    first_names = ", ".join(f"{name!r:.40}" for name in names[:3]) or "nothing"
    return f"it is a zip archive of something else: it holds {first_names}. Name an RWKV .pth"


def content_fault(content: Mapping[object, object]) -> str | None:
    """What a dict is that is not one of tensors alone, and what to do; None where that cannot be told."""
    if {"param_groups", "state"} <= content.keys():
        return "it is the state of an optimizer, not weights. Name the weights that were saved beside it"
    for key in _NESTED:
        if isinstance(content.get(key), dict):
            program = f"torch.save(torch.load(path, weights_only=True)[{key!r}], out)"
            return f"it is a trainer's checkpoint, which has its weights under {key!r}. Take them out: {program}"
    if "_strategy" in content:
        return f"it was converted for inference by the package rwkv. {_ORIGINAL}"
    return None


def names_fault(names: Iterable[str]) -> str | None:
    """What tensors of these names are beside a model's weights or in their place, and what to do; None: not known."""
    names = list(names)
    if name := next((name for name in names if _NOT_MERGED.search(name.replace("lora_", "lora."))), None):
        return f"they hold a LoRA that is not merged ({name!r:.80}). Merge it into the weights that it was trained on"
    if name := next((name for name in names if name.endswith("time_state")), None):
        return (
            f"they hold a tuned state ({name!r:.80}), which is no part of a model. Leave the tensors *.time_state out, "
            "or name the weights that it was tuned for"
        )
    if any(name.startswith(("exp_avg/", "exp_avg_sq/")) for name in names):
        return "they are the moments of an optimizer. Name the weights.pth beside them"
    if any(".attention." in name or name.startswith("rwkv.") for name in names):
        return "they have the names of the package transformers. Use the .pth of the same model"
    if any(re.search(r"(^|\.)layers\.\d+\.", name) for name in names):
        return "they have the names of flash-linear-attention or another program. Use the .pth of the same model"
    return None
