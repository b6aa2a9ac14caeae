"""Folder in the layout of fla-hub, which flash-linear-attention, rwkv7-hf, vLLM, SGLang and llama.cpp read. Torch-free.

Fields of config.json: fla/models/rwkv7/configuration_rwkv7.py; those of the tokenizer: rwkv7_hf/tokenization_rwkv7.py.
"""

from __future__ import annotations

from rwkv_cluster.interchange.export.format import Companions, ExportedModel, Format
from rwkv_cluster.interchange.export.tokenizer_files import END_OF_DOCUMENT, hub_files, json_file, world_files
from rwkv_cluster.interchange.layouts import LAYOUTS
from rwkv_cluster.model.parameter_shapes import model_dims

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NORM_EPS = 1e-5
HEAD_NORM_EPS = 64e-5
"""Of the group norm over heads in RWKV-LM, whatever the head size; the readers compute head size * norm_eps."""


def size_fields(model: ExportedModel) -> dict[str, object]:
    """Sizes, ranks and ids that every reader of RWKV-7's folders asks for, under the names that they agree on.

    All are given, because the readers' defaults are of one size, and ranks follow no rule.
    """
    sizes = model_dims(model.config)
    return {
        "model_type": "rwkv7",
        "vocab_size": model.rows,
        "hidden_size": sizes.embd,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": model.config.n_layer,
        "head_dim": sizes.head_size,
        "num_heads": sizes.n_head,
        "decay_low_rank_dim": sizes.decay_rank,
        "a_low_rank_dim": sizes.a_rank,
        "v_low_rank_dim": sizes.v_rank,
        "gate_low_rank_dim": sizes.gate_rank,
        "norm_eps": NORM_EPS,
        "tie_word_embeddings": False,
        "torch_dtype": TORCH_DTYPES[model.dtype],
        **END_OF_DOCUMENT,
        **({"max_position_embeddings": model.ctx_len} if model.ctx_len else {}),
    }


def fla_config(model: ExportedModel) -> dict[str, object]:
    """config.json of the layout."""
    sizes = model_dims(model.config)
    return size_fields(model) | {
        "architectures": ["RWKV7ForCausalLM"],
        "hidden_ratio": sizes.ffn / sizes.embd,
        "value_dim": [sizes.att] * model.config.n_layer,
        "norm_bias": True,
        "norm_first": True,
        "hidden_act": "sqrelu",
        "attn_mode": "chunk",
        "fuse_norm": False,
        "use_cache": True,
    }


def folder_files(model: ExportedModel, config: dict[str, object]) -> dict[str, bytes]:
    """config.json, generation_config.json and, where other programs know the tokenizer, its files."""
    files = {"config.json": json_file(config), "generation_config.json": json_file(dict(END_OF_DOCUMENT))}
    if model.world_vocabulary is not None:
        files |= world_files(model.world_vocabulary, model.rows)
    elif model.hub_tokenizer is not None:
        files |= hub_files(model.hub_tokenizer)
    return files


NO_TOKENIZER = (
    "it has no tokenizer, because the model's is not known to be the World vocabulary or one of the Hugging Face Hub: "
    "the program that loads it must be given token ids, or a tokenizer of your own"
)


def _companions(model: ExportedModel) -> Companions:
    notes, config, N = [], fla_config(model), model.config.head_size_a
    if N != 64:
        config["norm_eps"] = HEAD_NORM_EPS / N
        notes.append(
            f"norm_eps is {HEAD_NORM_EPS / N:g}, since the readers multiply it by the head size {N} where RWKV-LM has "
            f"64e-5; their other norms use it too, which moves logits by some 1e-4 of the largest"
        )
    if model.config.n_layer == 1:
        notes.append("flash-linear-attention itself divides by zero with one layer; rwkv7-hf reads it")
    if not model.has_tokenizer:
        notes.append(NO_TOKENIZER)
    return Companions(folder_files(model, config), tuple(notes))


FLA = Format(
    name="fla",
    reader="flash-linear-attention, rwkv7-hf, vLLM, SGLang",
    versions=LAYOUTS["fla"].versions,
    container="folder",
    suffix="-fla",
    rename=LAYOUTS["fla"].to_other,
    companions=_companions,
)
