"""Tokenizers: text to token ids and back."""

from rwkv_cluster.tokenizer.base import BaseTokenizer
from rwkv_cluster.tokenizer.integer import AngleTokenizer, IntegerTokenizer
from rwkv_cluster.tokenizer.tokenizers import (
    ByteTokenizer,
    GenericTokenizer,
    as_tokenizer,
    build_tokenizer,
    create_default_vocab_file,
    decode_for_display,
    describe_tokenizer,
    encode_to_array,
    require_tokenizer,
    save_vocab,
    tokenizer_identity,
)
from rwkv_cluster.tokenizer.trie_matcher import id_dtype
from rwkv_cluster.tokenizer.vocabulary import TokenizationError, VocabularyError, create_vocab_file_from_tokens

__all__ = [
    "AngleTokenizer",
    "BaseTokenizer",
    "ByteTokenizer",
    "GenericTokenizer",
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
    "id_dtype",
    "require_tokenizer",
    "save_vocab",
    "tokenizer_identity",
]
