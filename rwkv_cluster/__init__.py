"""Train RWKV-5, RWKV-6 and RWKV-7 from one YAML file, on a laptop, a node or a cluster.

The public names are loaded when they are first used: importing this package imports no torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which is not imported for this: until a command has come past it, it is deaf
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_HOME = {
    "RWKVTrainingPipeline": "rwkv_cluster.pipeline",
    "Config": "rwkv_cluster.config",
    "ModelConfig": "rwkv_cluster.config",
    "TrainingConfig": "rwkv_cluster.config",
    "DataConfig": "rwkv_cluster.config",
    "CheckpointConfig": "rwkv_cluster.config",
    "LoggingConfig": "rwkv_cluster.config",
    "load_config": "rwkv_cluster.config.loader",
    "inspect_rwkv_checkpoint": "rwkv_cluster.interchange.checkpoint_info",
    "load_checkpoint_for_training": "rwkv_cluster.interchange.checkpoint_info",
    "validate_checkpoint_compatibility": "rwkv_cluster.interchange.checkpoint_info",
    "DetectedModelConfig": "rwkv_cluster.interchange.checkpoint_info",
    "NumpyToJsonlConverter": "rwkv_cluster.data.converters",
    "JsonlToBinIdxConverter": "rwkv_cluster.data.converters",
    "DataPipeline": "rwkv_cluster.data.converters",
    "BaseTokenizer": "rwkv_cluster.tokenizer",
    "ByteTokenizer": "rwkv_cluster.tokenizer",
    "GenericTokenizer": "rwkv_cluster.tokenizer",
    "AngleTokenizer": "rwkv_cluster.tokenizer",
    "IntegerTokenizer": "rwkv_cluster.tokenizer",
    "create_vocab_file_from_tokens": "rwkv_cluster.tokenizer",
    "create_default_vocab_file": "rwkv_cluster.tokenizer",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
