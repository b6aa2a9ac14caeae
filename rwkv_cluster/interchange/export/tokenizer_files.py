"""The World vocabulary, and the tokenizer's files that a model's folder has beside its tensors. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rwkv_cluster.tokenizer.vocabulary import parse_vocabulary, vocabulary_digest

WORLD_FILE = "rwkv_vocab_v20230424.txt"
"""The name under which every reader looks for it."""
WORLD_DIGEST = "e8e7025bfbfa9c6e071fa66e7539d655133c2cfabe9b1a9c72a98e2114b35dc5"
"""`vocabulary_digest` of RWKV-LM's World vocabulary of 2023-04-24: ids 1 to 65529."""
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


def world_vocabulary(path: Path) -> bytes | None:
    """Content of a vocabulary file with LF where it is the World vocabulary, else None.

    Raises MissingDataError, VocabularyError.
    """
    if vocabulary_digest(parse_vocabulary(path)) != WORLD_DIGEST:
        return None
    return path.read_bytes().replace(b"\r\n", b"\n")


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
        WORLD_FILE: vocabulary,
        "tokenizer_config.json": json_file(tokenizer),
        "special_tokens_map.json": json_file(special),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


def json_file(content: Mapping[str, object]) -> bytes:
    """A JSON file as the programs of Hugging Face write theirs."""
    return (json.dumps(content, indent=2) + "\n").encode()
