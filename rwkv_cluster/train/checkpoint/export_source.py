"""Weights to export by what a user names: a work directory, whose newest are meant, or a weights file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.errors import MissingCheckpointError
from rwkv_cluster.interchange.export.tokenizer_files import world_vocabulary
from rwkv_cluster.interchange.export.write import Source
from rwkv_cluster.model.weights_file import infer_model_config, load_pth, peek_pth, strip_prefixes
from rwkv_cluster.runtime.own_file import require_own
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.train.checkpoint.save_load import MANIFEST, Checkpoint, newest_verified
from rwkv_cluster.train.checkpoint.shards import ShardedTensors
from rwkv_cluster.workdir import WorkDir, sha256_file


def source_of(path: Path, vocabulary: Path | None = None) -> Source:
    """The newest verified checkpoint of a work directory, else its final weights; or a weights file.

    Tensors are mapped, or assembled from shards one at a time. vocabulary: file of the model's; default that of the
    work directory, also of the one that a weights file lies in. Raises MissingCheckpointError where there is nothing,
    CheckpointError where what is there is damaged or no RWKV, DataError for a vocabulary that is malformed.
    """
    if not path.is_dir():
        return _of_file(path, WorkDir(path.absolute().parent.parent), vocabulary)
    work = WorkDir(path)
    checkpoint = newest_verified(work.checkpoints)
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, work, vocabulary)
    if work.final_weights.exists():
        return _of_file(work.final_weights, work, vocabulary)
    raise MissingCheckpointError(
        f"{work.root} has no trained weights: no checkpoint and no {work.final_weights.name}",
        remedy="Train first: `rwkv-cluster train CONFIG`, or name a weights file",
    )


def _of_checkpoint(checkpoint: Checkpoint, work: WorkDir, vocabulary: Path | None) -> Source:
    whole = checkpoint.path / "weights.pth"
    tensors = peek_pth(whole) if whole.name in checkpoint.files else checkpoint.weights()
    shapes = checkpoint.state.shapes if isinstance(tensors, ShardedTensors) else _shapes(tensors)
    assert shapes is not None
    outlines = {name: torch.empty(list(shape), device="meta") for name, shape in shapes.items()}
    config = _run_config(work)
    return Source(
        path=checkpoint.path,
        tensors=tensors,
        outlines=outlines,
        config=infer_model_config(outlines),
        label=checkpoint.path.name,
        folder=work.out,
        digest=sha256_file(checkpoint.path / MANIFEST),
        dtype=config.training.precision if config else None,
        world_vocabulary=_world(work, vocabulary),
        ctx_len=config.model.ctx_len if config else None,
    )


def _of_file(path: Path, work: WorkDir, vocabulary: Path | None) -> Source:
    tensors = strip_prefixes(load_pth(path, mapped=True))
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    config = _run_config(work)
    with bytes_left(f"sha256 of {path.name}", path.stat().st_size) as left:
        digest = sha256_file(path, left.advance)
    return Source(
        path=path,
        tensors=tensors,
        outlines=outlines,
        config=infer_model_config(outlines),
        label=path.stem,
        folder=path.absolute().parent,
        digest=digest,
        world_vocabulary=_world(work, vocabulary),
        ctx_len=config.model.ctx_len if config else None,
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _run_config(work: WorkDir) -> Config | None:
    """Configuration of the last session; None outside a work directory."""
    if not work.config_yaml.exists():
        return None
    require_own(work.config_yaml)
    return load_config(work.config_yaml)


def _world(work: WorkDir, vocabulary: Path | None) -> bytes | None:
    """Content of the vocabulary's file where that is the World vocabulary."""
    path = vocabulary or (work.vocabulary if work.vocabulary.exists() else None)
    return None if path is None else world_vocabulary(path)
