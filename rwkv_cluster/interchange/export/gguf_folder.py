"""Folder from which llama.cpp's convert_hf_to_gguf.py makes a GGUF file. Torch-free.

conversion/rwkv.py in llama.cpp reads fla-hub's names and config.json, and cannot do without the World vocabulary.
llama.cpp has 64e-5 in the norm over heads by itself, so that norm_eps is that of the other norms for any head size.
"""

from __future__ import annotations

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.interchange.export.fla import FLA, fla_config, folder_files
from rwkv_cluster.interchange.export.format import Companions, ExportedModel, Format
from rwkv_cluster.tokenizer.world import FILE_NAME


def _companions(model: ExportedModel) -> Companions:
    if model.world_vocabulary is None:
        raise ConfigError(
            "llama.cpp's converter takes RWKV-7 with the World vocabulary only, and the model's is not known to be it",
            remedy=f"Where it is, name its file: --vocab-file {FILE_NAME}",
        )
    needed = model.world_vocabulary.count(b"\n") + 1
    if model.rows < needed:
        raise ConfigError(
            f"the model has {model.rows:,} rows in emb, and the World vocabulary has {needed:,} ids",
            remedy="Name the vocabulary that it was trained with",
        )
    return Companions(folder_files(model, fla_config(model)))


GGUF_FOLDER = Format(
    name="gguf-folder",
    reader="llama.cpp, by its convert_hf_to_gguf.py",
    versions=FLA.versions,
    container="folder",
    suffix="-gguf-folder",
    rename=FLA.rename,
    companions=_companions,
)
