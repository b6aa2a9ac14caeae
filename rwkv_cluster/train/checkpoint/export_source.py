"""Weights to export by what a user names: a work directory, whose newest are meant, or weights of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import TOKENIZER_TYPES, Config
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.run_tokenizer import tokenizer_of_run
from rwkv_cluster.errors import MissingCheckpointError
from rwkv_cluster.interchange.checkpoint_info import digests
from rwkv_cluster.interchange.export.write import Source
from rwkv_cluster.interchange.read import Weights, is_work_dir, open_weights
from rwkv_cluster.interchange.tokenizer_file import tokenizer_beside
from rwkv_cluster.model.weights_file import infer_model_config, peek_pth
from rwkv_cluster.runtime.own_file import require_own
from rwkv_cluster.tokenizer import GenericTokenizer, has_world_vocabulary, world_vocabulary
from rwkv_cluster.tokenizer.hub import HubTokenizer
from rwkv_cluster.train.checkpoint.save_load import MANIFEST, Checkpoint, newest_verified
from rwkv_cluster.train.checkpoint.shards import ShardedTensors
from rwkv_cluster.workdir import WorkDir, sha256_file


def source_of(path: Path, vocabulary: Path | None = None) -> Source:
    """The newest verified checkpoint of a work directory, else its final weights; or a weights file or folder.

    Tensors are mapped, or assembled from shards one at a time. vocabulary: file of the model's; default that of the
    work directory, also of the one that weights lie in, or one beside the weights. Raises MissingCheckpointError where
    there is nothing, CheckpointError where what is there is damaged or no RWKV, DataError for a vocabulary that is
    malformed.
    """
    if not is_work_dir(path):
        return _of_weights(path, WorkDir(path.absolute().parent.parent), vocabulary)
    work = WorkDir(path)
    checkpoint = newest_verified(work.checkpoints)
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, work, vocabulary)
    if work.final_weights.exists():
        return _of_weights(work.final_weights, work, vocabulary)
    raise MissingCheckpointError(
        f"{work.root} has no trained weights: no checkpoint and no {work.final_weights.name}",
        remedy="Train first: `rwkv-cluster train CONFIG`, or name weights",
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
        ctx_len=config.model.ctx_len if config else None,
        **_tokenizer_fields(_tokenizer(work, config, work.data, vocabulary)),
    )


def _of_weights(path: Path, work: WorkDir, vocabulary: Path | None) -> Source:
    weights = open_weights(path)
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.tensors.items()}
    config = _run_config(work)
    return Source(
        path=path,
        tensors=weights.tensors,
        outlines=outlines,
        config=infer_model_config(outlines),
        label=path.name if path.is_dir() else path.stem,
        folder=path.absolute().parent,
        digest=_digest(weights),
        ctx_len=config.model.ctx_len if config else None,
        **_tokenizer_fields(_tokenizer(work, config, path if path.is_dir() else path.absolute().parent, vocabulary)),
    )


def _digest(weights: Weights) -> str:
    """The sha256 of the one file, or of the lines `<sha256>  <name>` of several, as sha256sum writes them."""
    by_name = digests(weights)
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _run_config(work: WorkDir) -> Config | None:
    """Configuration of the last session; None outside a work directory."""
    if not work.config_yaml.exists():
        return None
    require_own(work.config_yaml)
    return load_config(work.config_yaml)


def _tokenizer(work: WorkDir, config: Config | None, beside: Path, vocabulary: Path | None) -> Any:
    """The tokenizer of the weights; None where it is not known, or is a class that only its owner may import."""
    if vocabulary is not None:
        return GenericTokenizer(vocabulary)
    if config is not None:
        tokenizer = config.data.tokenizer
        return tokenizer_of_run(tokenizer, work.data) if tokenizer.type in TOKENIZER_TYPES else None
    return tokenizer_beside(beside)


def _tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    """Fields of Source for a tokenizer that other programs know; none for any other."""
    if has_world_vocabulary(tokenizer):
        return {"world_vocabulary": world_vocabulary(tokenizer)}
    return {"hub_tokenizer": tokenizer.exported()} if isinstance(tokenizer, HubTokenizer) else {}
