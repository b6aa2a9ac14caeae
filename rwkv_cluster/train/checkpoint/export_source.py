"""Weights to export by what a user names: a work directory, whose newest are meant, or weights of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.adapters.base import MergedTensors
from rwkv_cluster.adapters.peft_folder import TrainedAdapter
from rwkv_cluster.adapters.table import STATE
from rwkv_cluster.config import TOKENIZER_TYPES, AdapterConfig, Config
from rwkv_cluster.config.loader import load_config
from rwkv_cluster.data.run_tokenizer import tokenizer_of_run
from rwkv_cluster.errors import ConfigError, MissingCheckpointError
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
from rwkv_cluster.train.checkpoint.weights import whole_weights
from rwkv_cluster.workdir import WorkDir, sha256_file


def source_of(path: Path, vocabulary: Path | None = None, *, merged: bool = False) -> Source:
    """The newest verified checkpoint of a work directory, else its final weights; or a weights file or folder.

    Tensors are mapped, or assembled from shards or merged one at a time. vocabulary: file of the model's; default that
    of the work directory, also of the one that weights lie in, or one beside the weights. merged: the base with the
    adapter of a run in it. Raises MissingCheckpointError where there is nothing, CheckpointError where what is there is
    damaged or no RWKV, DataError for a vocabulary that is malformed, ConfigError where `merged` and an adapter do not
    go together.
    """
    work = WorkDir(path)
    checkpoint = newest_verified(work.checkpoints) if is_work_dir(path) else None
    has_adapter = checkpoint is not None and checkpoint.state.base is not None
    if checkpoint is not None and checkpoint.state.config.get("adapter", {}).get("kind") == STATE:
        raise ConfigError(
            f"{path} has weights as it began with, and a state that it has trained, which is no part of a model",
            remedy=f"The state is {work.final_weights}; `rwkv-cluster consolidate` writes both in one .pth",
        )
    if has_adapter != merged:
        raise ConfigError(
            f"{path} has {'an adapter beside its weights' if has_adapter else 'no adapter to be merged'}",
            remedy="Add --merged for both in one, or use --format peft for the adapter alone"
            if has_adapter
            else f"Export its weights as they are: `rwkv-cluster export {path} --format pth`",
        )
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, work, vocabulary)
    if not is_work_dir(path):
        return _of_weights(path, WorkDir(path.absolute().parent.parent), vocabulary)
    if work.final_weights.exists():
        return _of_weights(work.final_weights, work, vocabulary)
    raise MissingCheckpointError(
        f"{work.root} has no trained weights: no checkpoint and no {work.final_weights.name}",
        remedy="Train first: `rwkv-cluster train CONFIG`, or name weights",
    )


def adapter_of(path: Path) -> tuple[TrainedAdapter, Checkpoint]:
    """The adapter of a work directory's newest verified checkpoint, and that checkpoint.

    Raises MissingCheckpointError, ConfigError where there is none, CheckpointError where it is damaged.
    """
    work = WorkDir(path)
    checkpoint = newest_verified(work.checkpoints) if is_work_dir(path) else None
    if checkpoint is None:
        raise MissingCheckpointError(
            f"{path} has no checkpoint, from which an adapter could be taken", remedy="Name a run's work directory"
        )
    if checkpoint.state.base is None:
        raise ConfigError(f"{path} has no adapter: all of its weights were trained", remedy="Choose another --format")
    config = checkpoint.state.config
    if config["adapter"]["kind"] == STATE:
        raise ConfigError(
            f"{path} has trained a state, which peft does not know", remedy=f"The state is {work.final_weights}"
        )
    base_name = config["training"].get("init_from") or str(work.initial_weights)
    trained = TrainedAdapter(
        adapter=AdapterConfig(**config["adapter"]),
        parts=dict(checkpoint.weights()),
        model_type=config["model"]["model_type"],
        base=checkpoint.state.base,
        base_name=base_name,
    )
    return trained, checkpoint


def _of_checkpoint(checkpoint: Checkpoint, work: WorkDir, vocabulary: Path | None) -> Source:
    whole = checkpoint.path / "weights.pth"
    has_whole = whole.name in checkpoint.files and checkpoint.state.base is None
    tensors = peek_pth(whole) if has_whole else whole_weights(checkpoint, work)
    shapes = checkpoint.state.shapes
    if isinstance(tensors, MergedTensors):
        shapes = _shapes(peek_pth(work.initial_weights))
    elif not isinstance(tensors, ShardedTensors):
        shapes = _shapes(tensors)
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
