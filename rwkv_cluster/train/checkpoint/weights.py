"""Weights by what a user names: a file or folder of weights, or a work directory whose newest weights are meant."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_cluster.adapters.base import MergedTensors, require_base
from rwkv_cluster.adapters.table import STATE
from rwkv_cluster.config import AdapterConfig, ModelConfig
from rwkv_cluster.errors import CheckpointError, ConfigError, MissingCheckpointError
from rwkv_cluster.interchange.read import is_work_dir, read_weights
from rwkv_cluster.model.own_state import ATT_SHIFT_NAME, FFN_SHIFT_NAME, WKV_NAME, as_file, set_own_state
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import fit_state_dict, infer_model_config, load_pth, peek_pth, save_pth
from rwkv_cluster.runtime.terminal.time_left import Countdown
from rwkv_cluster.train.checkpoint.save_load import Checkpoint, checkpoint_path, list_steps, newest_verified, verify
from rwkv_cluster.train.checkpoint.shards import ShardedTensors
from rwkv_cluster.workdir import WorkDir

log = logging.getLogger("rwkv_cluster")


def newest_weights(work: WorkDir) -> dict[str, Tensor]:
    """The newest verified checkpoint's weights, else those of out/rwkv-final.pth.

    Raises MissingCheckpointError when the directory has neither, CheckpointError when what is there is damaged.
    """
    checkpoint = newest_verified(work.checkpoints)
    if checkpoint is not None:
        return dict(whole_weights(checkpoint, work))
    if work.final_weights.exists():
        return load_pth(work.final_weights)
    raise MissingCheckpointError(
        f"{work.root} has no trained weights: no checkpoint and no {work.final_weights.name}",
        remedy="Train first: `rwkv-cluster train CONFIG`",
    )


def whole_weights(checkpoint: Checkpoint, work: WorkDir) -> dict[str, Tensor] | ShardedTensors | MergedTensors:
    """Weights of the model of a checkpoint of `work`; those of an adapter are merged into its base, in fp32.

    Raises CheckpointError where the work directory has no base, or another one.
    """
    expected, path = checkpoint.state.base, work.initial_weights
    if expected is None:
        return checkpoint.weights()
    base = load_pth(path, mapped=True)
    require_base(base, expected, str(path))
    adapter, parts = AdapterConfig(**checkpoint.state.config["adapter"]), dict(checkpoint.weights())
    if adapter.kind == STATE:
        return {**base, **as_file(parts, checkpoint.state.config["model"]["model_type"])}
    return MergedTensors(base, parts, adapter)


def final_weights(checkpoint: Checkpoint, work: WorkDir, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a run writes as its weights in `dtype`: the model, or of state tuning the state alone, in fp32."""
    if checkpoint.state.config.get("adapter", {}).get("kind") == STATE:
        return as_file(dict(checkpoint.weights()), checkpoint.state.config["model"]["model_type"])
    return {name: tensor.to(dtype) for name, tensor in dict(whole_weights(checkpoint, work)).items()}


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
    save_pth(path, dict(whole_weights(checkpoint, work)), dtype)
    return path


def average(sources: Sequence[Path], *, steps: Sequence[int] = (), output: Path | None = None) -> Path:
    """Write the uniform mean of weights, and return its path. Each element is summed in fp64 and rounded once.

    sources: work directories, whose checkpoints of `steps` count, all of them where none are named; and files or
    folders of weights. The mean has the dtype of the first: fp32 where that is a checkpoint. output: default
    out/average-<first step>-<last step>-of-<number>.pth where the one source is a work directory.

    Raises MissingCheckpointError where something is not there, CheckpointError where it is damaged or of another model,
    ConfigError where there is no name for the output.
    """
    works = {source: WorkDir(source) for source in sources if is_work_dir(source)}
    checkpoints = {source: _of_steps(work, steps) for source, work in works.items()}
    if output is None:
        if len(sources) > 1 or not works:
            raise ConfigError("weights of several places have no place of their own", remedy="Name a file by --output")
        ((work, found),) = zip(works.values(), checkpoints.values(), strict=True)
        output = work.out / f"average-{found[0].step}-{found[-1].step}-of-{len(found)}.pth"
    parts: dict[str, dict[str, Tensor] | ShardedTensors] = {}
    for source in sources:
        parts |= {str(checkpoint.path): _mapped(checkpoint) for checkpoint in checkpoints.get(source, ())}
        if source not in works:
            parts[str(source)] = read_weights(source, mapped=True)
    if len(parts) < 2:
        raise ConfigError(f"{next(iter(parts))} alone has no average", remedy="Name at least two, or two steps")
    save_pth(output, _mean(parts))
    return output


def _of_steps(work: WorkDir, steps: Sequence[int]) -> list[Checkpoint]:
    """Verified checkpoints in order. Raises MissingCheckpointError where one is not there."""
    there = list_steps(work.checkpoints)
    missing = [step for step in steps if step not in there]
    if missing or not there:
        wanted = f"checkpoint of step {missing[0]}" if missing else "checkpoint"
        raise MissingCheckpointError(
            f"{work.checkpoints} has no {wanted}",
            remedy=f"Steps that are there: {', '.join(map(str, there)) or 'none'}",
        )
    return [verify(checkpoint_path(work.checkpoints, step)) for step in sorted(set(steps)) or there]


def _mapped(checkpoint: Checkpoint) -> dict[str, Tensor] | ShardedTensors:
    """Weights of a verified checkpoint, left in their file. Raises ConfigError where it holds a part of a model."""
    if checkpoint.state.base is not None:
        raise ConfigError(
            f"{checkpoint.path} holds an adapter or a state alone, which has no average",
            remedy="Average merged weights",
        )
    whole = checkpoint.path / "weights.pth"
    return peek_pth(whole) if whole.name in checkpoint.files else checkpoint.weights()


def _mean(parts: Mapping[str, dict[str, Tensor] | ShardedTensors]) -> dict[str, Tensor]:
    """Mean of weights, name by name. Raises CheckpointError for names or shapes that differ."""
    (first, start), *others = parts.items()
    names = list(start.keys())
    for path, part in others:
        if other := sorted(set(names) ^ set(part.keys())):
            raise CheckpointError(f"{path} and {first} hold other models: only one of them has {other[0]}")
    means: dict[str, Tensor] = {}
    with Countdown("averaging", len(names), "tensors") as left:
        for name in names:
            own = start[name]
            total = own.double()
            for path, part in others:
                tensor = part[name]
                if tensor.shape != own.shape:
                    raise CheckpointError(
                        f"{path} and {first} hold other models: {name} is {tuple(tensor.shape)} and {tuple(own.shape)}"
                    )
                total += tensor
            means[name] = (total / len(parts)).to(own.dtype)
            left.advance(1)
    return means


def load_model(
    source: Path,
    *,
    ctx_len: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RWKV:
    """An RWKV from a file or folder of weights or a work directory, its architecture inferred from the tensors."""
    return model_from_weights(source, weights_of(source), ctx_len=ctx_len, device=device, dtype=dtype)


def weights_of(source: Path) -> dict[str, Tensor]:
    """The newest weights of a work directory, or those of a file or folder, which stay in it until they are used."""
    return newest_weights(WorkDir(source)) if is_work_dir(source) else read_weights(source, mapped=True)


def model_from_weights(
    source: Path,
    weights: Mapping[str, Tensor],
    *,
    ctx_len: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RWKV:
    """An RWKV of `dtype` that holds `weights`, those of `source`; it begins from the state among them, in fp32.

    It is made where it is wanted: in the host's memory there is nothing of it. Raises CheckpointError.
    """
    state = {
        name: tensor for name, tensor in weights.items() if name.endswith((WKV_NAME, ATT_SHIFT_NAME, FFN_SHIFT_NAME))
    }
    try:
        weights = {name: tensor for name, tensor in weights.items() if name not in state}
        config: ModelConfig = infer_model_config(weights)
        if ctx_len is not None:
            config = config.model_copy(update={"ctx_len": ctx_len})
        with torch.device("meta"):
            model = RWKV(config)
        model.to(dtype).to_empty(device=device)
        model.load_state_dict(fit_state_dict(weights, model))
        if state:
            set_own_state(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return model
