"""Tokenizers: text to token ids and back."""

from rwkv_cluster.tokenizer.base import BaseTokenizer
from rwkv_cluster.tokenizer.hub import HubTokenizer
from rwkv_cluster.tokenizer.integer import AngleTokenizer, IntegerTokenizer
from rwkv_cluster.tokenizer.table import as_tokenizer, build_tokenizer, describe_tokenizer, is_built_in, saved_name
from rwkv_cluster.tokenizer.tokenizers import (
    ByteTokenizer,
    GenericTokenizer,
    create_default_vocab_file,
    decode_for_display,
    encode_to_array,
    require_tokenizer,
    save_vocab,
    tokenizer_identity,
)
from rwkv_cluster.tokenizer.trie_matcher import id_dtype
from rwkv_cluster.tokenizer.vocabulary import TokenizationError, VocabularyError, create_vocab_file_from_tokens
from rwkv_cluster.tokenizer.world import WORLD_ROWS, has_world_vocabulary, world_file, world_tokenizer, world_vocabulary

__all__ = [
    "WORLD_ROWS",
    "AngleTokenizer",
    "BaseTokenizer",
    "ByteTokenizer",
    "GenericTokenizer",
    "HubTokenizer",
    "IntegerTokenizer",
    "TokenizationError",
    "VocabularyError",
    "as_tokenizer",
    "build_tokenizer",
    "create_default_vocab_file",
    "create_vocab_file_from_tokens",
    "decode_for_display",
    "describe_tokenizer",
    "encode_to_array",
    "has_world_vocabulary",
    "id_dtype",
    "is_built_in",
    "require_tokenizer",
    "save_vocab",
    "saved_name",
    "tokenizer_identity",
    "world_file",
    "world_tokenizer",
    "world_vocabulary",
]
