"""Configuration of a run: its fields, and how a YAML file with overrides becomes a `Config`."""

from rwkv_cluster.config.launch import ContainerConfig, LaunchConfig, PrepareJobConfig
from rwkv_cluster.config.schema import (
    MAX_VOCAB_SIZE,
    TOKENIZER_TYPES,
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    Fused,
    GuardConfig,
    LoggingConfig,
    ModelConfig,
    ModelType,
    Precision,
    Strategy,
    TokenizerConfig,
    TrainingConfig,
    WkvBackend,
)
from rwkv_cluster.config.section import InvalidFields, Section

__all__ = [
    "MAX_VOCAB_SIZE",
    "TOKENIZER_TYPES",
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "ContainerConfig",
    "DataConfig",
    "Fused",
    "GuardConfig",
    "InvalidFields",
    "LaunchConfig",
    "LoggingConfig",
    "ModelConfig",
    "ModelType",
    "Precision",
    "PrepareJobConfig",
    "Section",
    "Strategy",
    "TokenizerConfig",
    "TrainingConfig",
    "WkvBackend",
]
