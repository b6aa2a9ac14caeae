"""Folder of transformers' Rwkv7ForCausalLM, its pull request 47787: native names behind `rwkv7.`. Torch-free."""

from __future__ import annotations

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.interchange.export.fla import NO_TOKENIZER, folder_files, size_fields
from rwkv_cluster.interchange.export.format import Companions, ExportedModel, Format
from rwkv_cluster.interchange.layouts import LAYOUTS


def _companions(model: ExportedModel) -> Companions:
    if model.config.head_size_a != 64:
        raise ConfigError(
            f"the head size is {model.config.head_size_a}, with which Rwkv7ForCausalLM computes other logits: its "
            "group norm has 1e-5 times the head size where RWKV-LM has 64e-5",
            remedy="Export as fla, whose config.json can correct it",
        )
    config = size_fields(model) | {
        "architectures": ["Rwkv7ForCausalLM"],
        "use_deep_embed": False,
        "wkv_state_dtype": "float32",
    }
    return Companions(folder_files(model, config), () if model.has_tokenizer else (NO_TOKENIZER,))


TRANSFORMERS = Format(
    name="transformers",
    reader="transformers with Rwkv7ForCausalLM, which is in a pull request only",
    versions=LAYOUTS["transformers"].versions,
    container="folder",
    suffix="-transformers",
    rename=LAYOUTS["transformers"].to_other,
    companions=_companions,
)
