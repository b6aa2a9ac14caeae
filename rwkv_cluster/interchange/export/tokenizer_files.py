"""Tokenizer's files that a model's folder has beside its tensors. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rwkv_cluster.tokenizer.world import FILE_NAME
from rwkv_cluster.workdir import HUB_TOKENIZER

END_OF_DOCUMENT = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# The conversation that the G1 models were trained on (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt): turns are divided by a
# blank line, so that texts of users have none; an answer begins with one blank, which the prompt leaves to the model.
CHAT_TEMPLATE = r"""
{%- macro clean(text) -%}
{%- for line in text.replace('\r\n', '\n').strip().split('\n') if line -%}
{{- line -}}{%- if not loop.last -%}{{- '\n' -}}{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if not loop.first -%}{{- '\n\n' -}}{%- endif -%}
{%- if message['role'] == 'system' -%}{{- 'System: ' + clean(message['content']) -}}
{%- elif message['role'] == 'user' -%}{{- 'User: ' + clean(message['content']) -}}
{%- elif message['role'] == 'tool' -%}{{- 'User: Function output:\n' + clean(message['content']) -}}
{%- else -%}{{- 'Assistant: ' + message['content'].strip() -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\n\nAssistant:' -}}
{%- if enable_thinking is defined -%}{{- ' <think' if enable_thinking else ' <think></think' -}}{%- endif -%}
{%- endif -%}
""".lstrip()


def world_files(vocabulary: bytes, rows: int) -> dict[str, bytes]:
    """Tokenizer files of the class RWKV7Tokenizer. vocabulary: of the World file; rows: of emb and head."""
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    tokenizer = {
        "tokenizer_class": "RWKV7Tokenizer",
        "model_vocab_size": rows,
        "errors": "replace",
        **special,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        FILE_NAME: vocabulary,
        "tokenizer_config.json": json_file(tokenizer),
        "special_tokens_map.json": json_file(special),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


def hub_files(content: bytes) -> dict[str, bytes]:
    """Tokenizer files of a tokenizer.json. Its id 0 ends a document, as in every tokenizer of this package."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = [token["content"] for token in json.loads(content).get("added_tokens", ()) if token["id"] == 0]
    if end:
        config |= {"eos_token": end[0]}
    return {HUB_TOKENIZER: content, "tokenizer_config.json": json_file(config)}


def json_file(content: Mapping[str, object]) -> bytes:
    """A JSON file as the programs of Hugging Face write theirs."""
    return (json.dumps(content, indent=2) + "\n").encode()
