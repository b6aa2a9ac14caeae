"""RWKV's World vocabulary, which the released models have: where its file is, and which vocabularies are it.

`rwkv_vocab_v20230424.txt` has the ids 1 to 65529; 0 is end of document, and the models have 65,536 rows. The file is
known by what it says and not by its bytes: published copies end their lines in LF or in CRLF.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer.tokenizers import GenericTokenizer
from rwkv_cluster.tokenizer.vocabulary import VocabularyError, vocabulary_digest, vocabulary_line

FILE_NAME = "rwkv_vocab_v20230424.txt"
WORLD_ROWS = 65_536
LAST_ID = 65_529
DIGEST = "e8e7025bfbfa9c6e071fa66e7539d655133c2cfabe9b1a9c72a98e2114b35dc5"  # see `vocabulary_digest`
_PACKAGE = "rwkv"  # of PyPI, whose wheel has the file


def world_file() -> Path | None:
    """The vocabulary's file in an installed package, which is not imported for it; None where there is none."""
    spec = None
    with suppress(ImportError, ValueError):  # a half-made module of that name
        spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () if (path := Path(folder) / FILE_NAME).is_file()), None)


def world_tokenizer(vocab_file: Path | None, added_tokens: Sequence[str] = ()) -> GenericTokenizer:
    """The tokenizer of the World vocabulary: 65,536 ids, of which 65530 to 65535 are unused without added tokens.

    vocab_file: default that of the installed package. Raises ConfigError where there is none, MissingDataError or
    VocabularyError for the file.
    """
    path = vocab_file or world_file()
    if path is None:
        raise ConfigError(
            f"tokenizer type is 'world', but no installed package has {FILE_NAME}",
            remedy="`pip install 'rwkv-cluster[world]'` brings it, or name the file in data.tokenizer.vocab_file",
        )
    tokenizer = GenericTokenizer(path, added_tokens, n_rows=WORLD_ROWS)
    if not has_world_vocabulary(tokenizer):
        raise VocabularyError(
            f"{path}: its {len(tokenizer.idx2token):,} tokens are not those of {FILE_NAME}",
            remedy="Use type generic for another vocabulary",
        )
    return tokenizer


def has_world_vocabulary(tokenizer: Any) -> bool:
    """Whether a tokenizer of any class has the tokens of the World vocabulary, and else only added ones."""
    if type(tokenizer) is not GenericTokenizer:
        return False
    added = {text.encode() for text in tokenizer.added_tokens}
    if any(token not in added for token_id, token in tokenizer.idx2token.items() if token_id > LAST_ID):
        return False
    tokens = {token_id: token for token_id, token in tokenizer.idx2token.items() if 0 < token_id <= LAST_ID}
    return vocabulary_digest(tokens) == DIGEST


def world_vocabulary(tokenizer: Any) -> bytes:
    """Content of the World vocabulary's file with LF, byte for byte as RWKV-LM has it: 1,093,733 bytes.

    Added tokens are lines at its end. tokenizer: of the model that the file is for. Raises ConfigError where it has
    another vocabulary.
    """
    if not has_world_vocabulary(tokenizer):
        raise ConfigError(
            f"the tokenizer is {type(tokenizer).__name__} with {int(tokenizer.vocab_size):,} ids, whose vocabulary is "
            f"not that of {FILE_NAME}",
            remedy="A runtime then needs this model's own tokenizer: its file is in the folder data of the work "
            "directory",
        )
    entries = sorted(tokenizer.idx2token.items())
    return "".join(vocabulary_line(token_id, token) for token_id, token in entries if token_id != 0).encode()
