"""What a format of `export` consists of: the type of a row of `table.FORMATS`. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.interchange.layouts import Reshape


@dataclass(frozen=True)
class ExportedModel:
    """What a format may ask about a model.

    Attributes:
        config: its sizes, `vocab_size` set.
        dtype: of the tensors in the export: "bf16", "fp16", "fp32".
        world_vocabulary: bytes of the World vocabulary's file with LF, where that is the model's; None: another one, or
            it is not known which.
        hub_tokenizer: content of a tokenizer.json, where the model's tokenizer is one of the Hugging Face Hub.
        ctx_len: tokens of a training sample; None where that is not known.
    """

    config: ModelConfig
    dtype: str
    world_vocabulary: bytes | None = None
    hub_tokenizer: bytes | None = None
    ctx_len: int | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether an export can have a tokenizer that other programs know."""
        return self.world_vocabulary is not None or self.hub_tokenizer is not None

    @property
    def rows(self) -> int:
        """Rows of emb and head."""
        assert self.config.vocab_size is not None
        return self.config.vocab_size


@dataclass(frozen=True)
class Companions:
    """Files beside the tensors, by name, and what the user should know, a sentence each."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def no_companions(model: ExportedModel) -> Companions:
    """Nothing beside the tensors."""
    return Companions({})


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as `--format` takes it.
        reader: which programs read it.
        versions: `model.model_type` that it exists for.
        container: "pth" and "safetensors" are one file, "folder" has safetensors in shards and companions.
        suffix: of the default name, behind that of the weights.
        rename: native name -> name there and reshape; None where the tensor has no place there.
        companions: the files beside the tensors. Raises ConfigError for a model that the reader would compute wrongly.
        dtype: the only one that it has; None: any.
    """

    name: str
    reader: str
    versions: tuple[str, ...]
    container: Literal["pth", "safetensors", "folder"]
    suffix: str
    rename: Callable[[str], tuple[str, Reshape] | None]
    companions: Callable[[ExportedModel], Companions] = no_companions
    dtype: str | None = None
