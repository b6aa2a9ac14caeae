"""What a weights file or folder holds, also under the names of `rwkv-trainer`, for scripts that move over from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_cluster.errors import CheckpointError, ConfigError
from rwkv_cluster.interchange.read import Weights, open_weights, read_weights
from rwkv_cluster.model.weights_file import infer_model_config
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.workdir import sha256_file


@dataclass(frozen=True)
class DetectedModelConfig:
    """Architecture read from a weights file. `ctx_len` is not in weights: the default or an override."""

    n_layer: int
    n_embd: int
    vocab_size: int
    model_type: str = "x060"
    ctx_len: int = 1024
    head_size_a: int = 64

    def to_dict(self) -> dict[str, Any]:
        """The six fields by name."""
        return asdict(self)


def inspect_rwkv_checkpoint(checkpoint_path: str | Path) -> dict[str, Any]:
    """Size, layout, number of parameters, dtypes, first ten names and detected architecture of weights.

    `detected_config` holds the six fields of DetectedModelConfig, `sizes` every field of ModelConfig that weights say;
    weights of no known architecture have `detection_error`, a sentence, instead. Raises MissingCheckpointError and
    CheckpointError as `read_weights`.
    """
    return describe(open_weights(Path(checkpoint_path)))


def describe(weights: Weights) -> dict[str, Any]:
    """What `inspect_rwkv_checkpoint` tells."""
    tensors = weights.tensors
    info: dict[str, Any] = {
        "checkpoint_path": str(weights.path),
        "file_size_mb": sum(file.stat().st_size for file in weights.files) / 2**20,
        "layout": weights.title,
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        "keys_sample": list(tensors)[:10],
    }
    try:
        info["detected_config"] = _detect(tensors).to_dict()
        info["sizes"] = infer_model_config(tensors).model_dump(exclude={"ctx_len"}, exclude_none=True)
    except CheckpointError as error:
        info["detection_error"] = str(error)
    return info


def digests(weights: Weights) -> dict[str, str]:
    """The sha256 of each file, by name."""
    with bytes_left(f"hashing {weights.path.name}", sum(file.stat().st_size for file in weights.files)) as left:
        return {file.name: sha256_file(file, left.advance) for file in weights.files}


def load_checkpoint_for_training(
    checkpoint_path: str | Path, override_config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], DetectedModelConfig]:
    """Tensors of a weights file or folder and their architecture, where `override_config` replaces detected fields.

    Raises ConfigError for an override that is no field of DetectedModelConfig, CheckpointError as `read_weights`.
    """
    overrides = dict(override_config or {})
    known = [field.name for field in fields(DetectedModelConfig)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ConfigError(f"override_config has '{unknown[0]}', which is not one of {', '.join(known)}")
    state_dict = read_weights(Path(checkpoint_path))
    return state_dict, replace(_detect(state_dict), **overrides)


def validate_checkpoint_compatibility(
    checkpoint_config: DetectedModelConfig, pipeline_config: Mapping[str, Any]
) -> tuple[bool, list[str]]:
    """Whether weights of `checkpoint_config` fit `pipeline_config`, and a sentence for each difference.

    Fields absent from `pipeline_config` are not compared, except vocab_size, n_embd and n_layer.
    `ctx_len` may differ.
    """
    required = ("vocab_size", "n_embd", "n_layer")
    differences = [
        f"{name} differs: checkpoint {value}, pipeline {pipeline_config.get(name)}"
        for name, value in checkpoint_config.to_dict().items()
        if name != "ctx_len" and (name in pipeline_config or name in required) and pipeline_config.get(name) != value
    ]
    return not differences, differences


def _detect(state_dict: Mapping[str, Tensor]) -> DetectedModelConfig:
    config = infer_model_config(state_dict)
    if config.vocab_size is None:
        raise CheckpointError("weights have no vocabulary size")
    return DetectedModelConfig(
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        ctx_len=config.ctx_len,
        head_size_a=config.head_size_a,
    )
