"""Weights by what a user names: a file or folder of weights, or a work directory whose newest weights are meant."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.interchange.read import is_work_dir, read_weights
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import fit_state_dict, infer_model_config, load_pth, save_pth
from rwkv_cluster.train.checkpoint.save_load import checkpoint_path, list_steps, newest_verified, verify
from rwkv_cluster.workdir import WorkDir

log = logging.getLogger("rwkv_cluster")


def newest_weights(work: WorkDir) -> dict[str, Tensor]:
    """The newest verified checkpoint's weights, else those of out/rwkv-final.pth.

    Raises MissingCheckpointError when the directory has neither, CheckpointError when what is there is damaged.
    """
    checkpoint = newest_verified(work.checkpoints)
    if checkpoint is not None:
        return dict(checkpoint.weights())
    if work.final_weights.exists():
        return load_pth(work.final_weights)
    raise MissingCheckpointError(
        f"{work.root} has no trained weights: no checkpoint and no {work.final_weights.name}",
        remedy="Train first: `rwkv-cluster train CONFIG`",
    )


def consolidate(work: WorkDir, *, step: int | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write the masters of a checkpoint, by however many ranks it was saved, to out/step-XXXXXXXX.pth.

    step: of the checkpoint; default the newest. Raises MissingCheckpointError when it is not there, CheckpointError
    when it is damaged.
    """
    steps = list_steps(work.checkpoints)
    if not steps or (step is not None and step not in steps):
        wanted, there = "checkpoint" if step is None else f"checkpoint of step {step}", ", ".join(map(str, steps))
        raise MissingCheckpointError(
            f"{work.checkpoints} has no {wanted}", remedy=f"Steps that are there: {there or 'none'}"
        )
    checkpoint = newest_verified(work.checkpoints) if step is None else verify(checkpoint_path(work.checkpoints, step))
    assert checkpoint is not None
    path = work.out / f"{checkpoint.path.name}.pth"
    log.info("writing %s", path)
    save_pth(path, dict(checkpoint.weights()), dtype)
    return path


def load_model(source: Path, *, ctx_len: int | None = None, device: str | torch.device = "cpu") -> RWKV:
    """An fp32 RWKV from a file or folder of weights or a work directory, its architecture inferred from the tensors."""
    if is_work_dir(source):
        return model_from_weights(newest_weights(WorkDir(source)), ctx_len=ctx_len, device=device)
    weights = read_weights(source, mapped=True)
    try:
        return model_from_weights(weights, ctx_len=ctx_len, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def model_from_weights(
    weights: dict[str, Tensor], *, ctx_len: int | None = None, device: str | torch.device = "cpu"
) -> RWKV:
    """An fp32 RWKV that holds `weights`."""
    config: ModelConfig = infer_model_config(weights)
    if ctx_len is not None:
        config = config.model_copy(update={"ctx_len": ctx_len})
    model = RWKV(config)
    model.load_state_dict(fit_state_dict(weights, model))
    return model.to(device)
