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
MAX_HEADER_BYTES = 100_000_000  # of safetensors, which refuses a longer one
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
_NOT_SUPPORTED = {
    ".qkv.": "RWKV-7b",
    "ffn.s_emb": "RWKV-7a, which has an embedding in every block (DeepEmbed)",
    "rosa": "an RWKV with ROSA",
    "ffn.enn": "a draft of RWKV-8",
}
_NESTED = ("state_dict", "model_state_dict", "model", "module", "weights", "params")


def require_weights_file(path: Path) -> None:
    """Raise MissingCheckpointError or CheckpointError unless a file is there that begins as torch.save's do."""
    if is_safetensors(path):
        program = "import sys, torch, safetensors.torch as s; torch.save(s.load_file(sys.argv[1]), sys.argv[2])"
        raise CheckpointError(
            f"{path}: it is a safetensors file", remedy=f'Convert it: python -c "{program}" IN OUT.pth'
        )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, rather than as torch.save's.

    Raises MissingCheckpointError or CheckpointError for a file of any other kind.
    """
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
        return False
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES:
        return True
    if head[:1] == b"\x80":
        raise CheckpointError(
            f"{path}: refused: it has the pickle format from before torch 1.6, which cannot be verified",
            remedy="Load it in an environment you trust and save it again with torch.save",
        )
    what, remedy = _kind(head) or (None, "")
    if what is None:
        raise CheckpointError(f"{path}: not a weights file: starts with {head[:4]!r}, wanted {ZIP!r}")
    raise CheckpointError(f"{path}: it is {what}", remedy=remedy)


def _kind(head: bytes) -> tuple[str, str] | None:
    """(Kind of a file with these first bytes, what to do); None for an unknown one."""
    if not head:
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
    if content.get("format") in ("rwkv-lora-adapter", "rwkv7-torchtitan-lora-adapter"):
        return "it is a LoRA of rwkv-rs/rwkv-lm, not a model. Merge it into the weights that it was trained on"
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
    if fault := not_a_model(names):
        return fault
    if any(".attention." in name or name.startswith("rwkv.") for name in names):
        return (
            "they have the names of the package transformers for an RWKV before 5.2. Use an RWKV-5.2, RWKV-6 or RWKV-7"
        )
    if name := next((name for name in names if re.search(r"(^|\.)layers\.\d+\.", name)), None):
        return f"they are not those of an RWKV, or have the names of an unknown program ({name!r:.80})"
    return None


def not_a_model(names: Iterable[str]) -> str | None:
    """What tensors with a name like these are, where no model that is supported has it, and what to do."""
    names = list(names)
    if name := next((name for name in names if _NOT_MERGED.search(name.replace("lora_", "lora."))), None):
        return f"they hold a LoRA that is not merged ({name!r:.80}). Merge it into the weights that it was trained on"
    states = [name for name in names if name.endswith(("time_state", "shift_state"))]
    if states and len(states) == len(names):
        return (
            "they are a state alone, and no model. Name the weights that it was made for; "
            "generate, chat and eval take the state by --state"
        )
    if states:
        return (
            f"they hold a tuned state ({states[0]!r:.80}), which is no part of a model. Leave the tensors *.time_state "
            "out, or name the weights that it was tuned for"
        )
    if any(name.startswith(("exp_avg/", "exp_avg_sq/")) for name in names):
        return "they are the moments of an optimizer. Name the weights.pth beside them"
    for part, what in _NOT_SUPPORTED.items():
        if name := next((name for name in names if part in name.lower()), None):
            return f"they are those of {what} ({name!r:.80}), which is not supported. Use weights of RWKV-7 (x070)"
    return None
