"""Sizes of a run that begins with weights from elsewhere: what `model.*` leaves open is read from them, or resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config, ModelConfig
from rwkv_cluster.config.schema import open_sizes
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.interchange.read import peek_weights
from rwkv_cluster.model.weights_file import infer_model_config
from rwkv_cluster.train.checkpoint.files import newest_good
from rwkv_cluster.workdir import WorkDir

INIT_FROM_REMEDY = "training.init_from names it"


def with_sizes_of_weights(config: Config, vocab_size: int | None = None) -> Config:
    """`config` with every size of the model that it leaves open, where training.init_from is set.

    They are those of the run's checkpoint, and before there is one those of the weights, without a look at their
    values. Weights with fewer rows than the tokenizer's `vocab_size` leave model.vocab_size open.

    Raises CheckpointError where there are no weights, or they differ from what `config` says. A file that is not on
    this machine does not matter where model.n_layer and model.n_embd are set.
    """
    if config.training.init_from is None:
        return config
    open_names = open_sizes(config)
    checkpoint, _ = newest_good(WorkDir(config.work_dir).checkpoints, checksums=False)
    if checkpoint is not None:
        sizes = checkpoint.state.config["model"]
    else:
        path = Path(config.training.init_from)
        if not path.exists() and not {"n_layer", "n_embd"} & set(open_names):
            return config
        sizes = _sizes(path, config.model, open_names)
    if vocab_size is not None and (sizes.get("vocab_size") or vocab_size) < vocab_size:
        open_names = [name for name in open_names if name != "vocab_size"]
    return with_model(config, {name: sizes[name] for name in open_names if name in sizes})


def with_model(config: Config, fields: dict[str, Any]) -> Config:
    """`config` with other values of `model.*`, which belong to a model that exists."""
    return config.model_copy(update={"model": config.model.model_copy(update=fields)})


def _sizes(path: Path, model: ModelConfig, open_names: list[str]) -> dict[str, Any]:
    """Sizes of the weights in `path`. Raises CheckpointError where one that is not open differs from `model`'s."""
    with cannot_start(path, INIT_FROM_REMEDY):
        sizes = infer_model_config(peek_weights(path).tensors).model_dump()
    given = [name for name in sizes if name not in (*open_names, "ctx_len", "vocab_size", "block0_value_residual")]
    other = [name for name in given if sizes[name] != getattr(model, name)]
    if other:
        differences = "; ".join(f"{name} {sizes[name]}, this run has {getattr(model, name)}" for name in other)
        fields = ", ".join(f"model.{name}" for name in other)
        with cannot_start(path, f"Leave {fields} out, and the weights say it"):
            raise CheckpointError(f"it holds another model ({differences})")
    return sizes


@contextmanager
def cannot_start(path: Path, remedy: str) -> Iterator[None]:
    """What is wrong with the weights in `path` is told as what keeps the run from starting."""
    try:
        yield
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise type(error)(f"{path} cannot start this run: {reason}. {remedy}") from error
