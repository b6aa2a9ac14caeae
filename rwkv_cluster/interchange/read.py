"""Weights as anyone has saved them: a file, or a folder of one or several, in any layout, under native names.

`read_weights` gives the tensors, `peek_weights` what is in the header alone. Neither runs code of a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.interchange.layouts import Layout, Reshape, layout_of
from rwkv_cluster.interchange.safetensors_header import read_header
from rwkv_cluster.model.recognise import is_safetensors, not_a_model
from rwkv_cluster.model.weights_file import load_pth, peek_pth, strip_prefixes
from rwkv_cluster.workdir import CONFIG_YAML

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the one weights file of a folder, the first that is there. With INDEX behind it: of a list of several."""
INDEX = ".index.json"
MAX_INDEX_BYTES = 100_000_000
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_NATIVE = "RWKV-LM's names"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of elements, by the dtype's name in a safetensors header."""
_WRAPPERS = re.compile(r"^((_forward_module|module|_orig_mod)\.)+")

ReadFile = Callable[[Path], dict[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """Weights as they were found. layout: None for RWKV-LM's. tensors: native names and shapes."""

    path: Path
    files: tuple[Path, ...]
    layout: Layout | None
    tensors: dict[str, Tensor]

    @property
    def title(self) -> str:
        """The layout in words."""
        return self.layout.title if self.layout else _NATIVE


def read_weights(path: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors of a weights file or folder on the CPU, under native names, in native shapes, in the file's dtypes.

    mapped: leave them in the file, from which the system reads what is used of them.

    Raises:
        MissingCheckpointError: no such file or folder, or one of its files is missing.
        CheckpointError: damaged or truncated, something other than the weights of a whole model, or of a layout that
            is not known.
    """
    return open_weights(path, mapped=mapped).tensors


def open_weights(path: Path, *, mapped: bool = True) -> Weights:
    """Weights and how they were found. Raises as `read_weights`."""
    return _weights(path, lambda file: read_tensors(file, mapped=mapped))


def read_tensors(file: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors of one file, .pth or safetensors, on the CPU, as they are in it. Raises as `read_weights`."""
    return _read_safetensors(file, mapped) if is_safetensors(file) else load_pth(file, mapped=mapped)


def peek_weights(path: Path) -> Weights:
    """Weights without a look at their values, in milliseconds for any size. Raises as `read_weights`."""

    def peek_file(file: Path) -> dict[str, Tensor]:
        if not is_safetensors(file):
            return peek_pth(file)
        with torch.device("meta"):
            return {
                name: torch.empty(record.shape, dtype=DTYPES[record.dtype])
                for name, record in read_header(file).items()
            }

    return _weights(path, peek_file)


def is_work_dir(path: Path) -> bool:
    """Whether a folder is a run's rather than one of weights."""
    return (path / CONFIG_YAML).exists() or (path / "out").is_dir()


def _weights(path: Path, read_file: ReadFile) -> Weights:
    path = Path(path)
    places = _places(path)
    files = tuple(dict.fromkeys(places.values())) if places else (_single_file(path),)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            if places is None or places.get(name) == file:
                tensors[name] = tensor
    if places and (missing := next((name for name in places if name not in tensors), None)):
        raise CheckpointError(
            f"{places[missing]}: it has no tensor {missing!r:.80}, which the index beside it promises",
            remedy="Download the folder again",
        )
    try:
        layout, native = _native(tensors)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=str(path), remedy=error.remedy) from error
    return Weights(path, files, layout, native)


def _places(path: Path) -> dict[str, Path] | None:
    """The file of each tensor, where an index says it; None where there is a single file."""
    if path.name.endswith(INDEX) and path.is_file():
        return _read_index(path)
    if not path.is_dir():
        return None
    for name in FOLDER_FILES:
        if (path / name).exists():
            return None
        if (path / (name + INDEX)).exists():
            return _read_index(path / (name + INDEX))
    raise _no_weights(path)


def _single_file(path: Path) -> Path:
    """The weights file that `path` is or, as a folder, has. Raises CheckpointError for a shard."""
    if path.is_dir():
        return next(path / name for name in FOLDER_FILES if (path / name).exists())
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1 and path.exists():
        raise CheckpointError(
            f"{path}: it is one of {int(shard[2])} files of one model", remedy=f"Name their folder: {path.parent}"
        )
    return path


def _no_weights(folder: Path) -> CheckpointError:
    """The error of a folder without weights, which says what it is instead."""
    if is_work_dir(folder):
        final = folder / "out" / "rwkv-final.pth"
        return CheckpointError(f"{folder}: it is the work directory of a run", remedy=f"Name its weights: {final}")
    names = sorted(entry.name for entry in folder.iterdir())
    if adapter := next((name for name in _ADAPTER_FILES if name in names), None):
        return CheckpointError(
            f"{folder}: it is the folder of an adapter (it has {adapter}), not a model",
            remedy="Merge it into the weights that it was trained on",
        )
    if shard := next((name for name in names if _SHARD.fullmatch(name)), None):
        return MissingCheckpointError(
            f"{folder}: it has {shard}, but no {FOLDER_FILES[0]}{INDEX}, which says what is in which file",
            remedy="Download that too",
        )
    listing = ", ".join(f"{name!r:.60}" for name in names[:5]) + (", ..." if names[5:] else "")
    wanted = ", ".join((FOLDER_FILES[0], FOLDER_FILES[0] + INDEX, FOLDER_FILES[1]))
    return CheckpointError(
        f"{folder}: a folder without weights: it has {listing or 'nothing'}, expected one of {wanted}",
        remedy="Name a weights file or its folder",
    )


def _read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor. Raises MissingCheckpointError where one is not there."""
    try:
        with open(path, "rb") as handle:
            places = json.loads(handle.read(MAX_INDEX_BYTES))["weight_map"]
        is_map = isinstance(places, dict) and all(isinstance(file, str) for file in places.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_map = False
    if not is_map or not places:
        is_safetensors(path)  # says it, where the index is a pointer or a web page
        raise CheckpointError(f"{path}: it is no index of weights: it has no weight_map", remedy="Download it again")
    for file in sorted(set(places.values())):
        if file != Path(file).name:
            raise CheckpointError(f"{path}: refused: it names {file!r:.80}, which is not in its own folder")
        if not (path.parent / file).exists():
            raise MissingCheckpointError(
                f"{path}: it names {file!r:.80}, which is not there", remedy="Download that file too"
            )
    return {name: path.parent / file for name, file in places.items()}


def _read_safetensors(path: Path, mapped: bool) -> dict[str, Tensor]:
    names = read_header(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated: {error}", remedy="Download or copy it again") from error
    return tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}


def _native(tensors: Mapping[str, Tensor]) -> tuple[Layout | None, dict[str, Tensor]]:
    """The layout of tensors, and the tensors under native names and in native shapes, without a copy."""
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    layout = layout_of(bare) if len(bare) == len(tensors) else None
    if layout is None:
        return None, strip_prefixes(tensors)
    native: dict[str, Tensor] = {}
    for name, tensor in bare.items():
        try:
            own, reshape = layout.to_native(name)
        except KeyError:
            fault = not_a_model([name])
            raise CheckpointError(
                f"weights cannot be used: {fault}"
                if fault
                else f"weights have {layout.title}, but no such model has {name!r:.80}"
            ) from None
        native[own] = _inward(tensor, reshape)
    if "blocks.0.ln0.weight" not in native:
        raise CheckpointError(
            f"weights have {layout.title}, with the first norm (ln0) fused into the embedding, which cannot be undone",
            remedy="Use the .pth that they were made from",
        )
    return layout, native


def _inward(tensor: Tensor, reshape: Reshape) -> Tensor:
    if reshape is Reshape.TRANSPOSE and tensor.ndim == 2:
        return tensor.t()
    return tensor.reshape(reshape.inward(tuple(tensor.shape))) if reshape is Reshape.FLATTEN else tensor
