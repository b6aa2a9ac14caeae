"""Added tokens of a vocabulary file: matched whole before all others, also across the pieces of a large text."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import world_file

from rwkv_cluster.config import TokenizerConfig
from rwkv_cluster.data.preparation.encode_large_file import encode_large_text
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer import (
    GenericTokenizer,
    TokenizationError,
    VocabularyError,
    build_tokenizer,
    create_vocab_file_from_tokens,
    describe_tokenizer,
    tokenizer_identity,
    world_vocabulary,
)

ADDED = ["<|", "<|a|>", "é|>", "<|a|>b"]
CHAT = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single bytes, and tokens that would run into added ones."""
    path = tmp_path_factory.mktemp("added") / "v.txt"
    create_vocab_file_from_tokens([*(bytes([b]) for b in range(256)), "a<|", "|>b", "|>b<", "aa", "ab<|a"], path)
    return path


def by_definition(tokenizer: GenericTokenizer, plain: GenericTokenizer, text: str) -> list[int]:
    """The leftmost added token, the longest of those that begin there, splits the text; then the same on the rest."""
    for start in range(len(text)):
        fitting = [token for token in tokenizer.added_tokens if text.startswith(token, start)]
        if fitting:
            token = max(fitting, key=len)
            rest = by_definition(tokenizer, plain, text[start + len(token) :])
            return [*plain.encode(text[:start]), tokenizer.token2idx[token.encode()], *rest]
    return plain.encode(text)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*ADDED, "a", "b", "<", "|", ">", "é", "aa"]), max_size=14).map("".join))
@example(text="a<|a|>")  # a token of the file that a piece would end within an added one
def test_ids_follow_the_definition_whole_and_in_pieces(text: str, vocabulary: Path) -> None:
    plain, data = GenericTokenizer(vocabulary), text.encode()
    for added in (ADDED, ["<|a|>"]):
        tokenizer = GenericTokenizer(vocabulary, added)
        ids = by_definition(tokenizer, plain, text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encodeBytes(data) == ids
        assert tokenizer.decode(ids) == text
        for size in (1, 3, 7):
            blocks = (data[start : start + size] for start in range(0, len(data), size))
            pieces = list(encode_large_text(tokenizer, blocks, Path("t")))
            assert np.concatenate([piece for piece, _ in pieces]).tolist() == ids
            assert "".join(used for _, used in pieces) == text


def test_new_tokens_follow_the_last_id_and_known_ones_keep_theirs(vocabulary: Path) -> None:
    tokenizer = GenericTokenizer(vocabulary, ["<|x|>", "aa", "<|y|>"])
    assert (tokenizer.new_ids, tokenizer.vocab_size) == (range(262, 264), 264)
    assert tokenizer.encode("<|y|>aaa<|x|>") == [263, 260, 98, 262]
    assert tokenizer.new_token_pieces() == {
        262: GenericTokenizer(vocabulary).encode("<|x|>"),
        263: GenericTokenizer(vocabulary).encode("<|y|>"),
    }
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("<|y|>aaa<|x|>") == [263, 260, 98, 262]
    assert tokenizer_identity(again) == tokenizer_identity(tokenizer)


def test_pieces_of_a_text_that_the_vocabulary_lacks_are_none(tmp_path: Path) -> None:
    create_vocab_file_from_tokens(["a"], tmp_path / "v.txt")
    tokenizer = GenericTokenizer(tmp_path / "v.txt", ["<|x|>"])
    assert tokenizer.encode("a<|x|>a") == [1, 2, 1]
    assert tokenizer.new_token_pieces() == {2: []}
    with pytest.raises(TokenizationError, match=r"^byte 6: cannot encode 0x62") as error:
        tokenizer.encode("a<|x|>b")
    assert error.value.byte_position == 6


def test_the_copy_of_a_run_has_them_too(vocabulary: Path, tmp_path: Path) -> None:
    tokenizer = GenericTokenizer(vocabulary, ADDED)
    tokenizer.save_vocab(tmp_path / "vocab.txt")
    copy = GenericTokenizer(tmp_path / "vocab.txt", ADDED)
    assert tokenizer_identity(copy) == tokenizer_identity(tokenizer)
    assert tokenizer_identity(GenericTokenizer(tmp_path / "vocab.txt")) != tokenizer_identity(tokenizer)
    assert tokenizer_identity(GenericTokenizer(vocabulary)) == {
        "class": "GenericTokenizer",
        "vocab_size": 262,
        "sha256": tokenizer_identity(GenericTokenizer(vocabulary))["sha256"],
    }


def test_world_takes_the_unused_ids_first() -> None:
    added = [f"<|{n}|>" for n in range(8)]
    tokenizer = build_tokenizer(TokenizerConfig(type="world", vocab_file=str(world_file()), added_tokens=added))
    assert tokenizer.encode("<|0|><|5|><|6|><|7|>") == [65_530, 65_535, 65_536, 65_537]
    assert (tokenizer.vocab_size, tokenizer.encode_to_array("a").dtype) == (65_538, np.int32)


@pytest.mark.system
def test_world_with_added_tokens_is_the_same_from_every_file(tmp_path: Path) -> None:
    file = str(world_file())
    config = TokenizerConfig(type="world", vocab_file=file, added_tokens=CHAT)
    tokenizer = build_tokenizer(config)
    plain = build_tokenizer(TokenizerConfig(type="world", vocab_file=file))
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [65_530, *plain.encode("user\nhi"), 65_531]
    assert tokenizer.vocab_size == 65_536
    assert world_vocabulary(tokenizer) == world_vocabulary(plain) + (
        b"65530 '<|im_start|>' 12\n65531 '<|im_end|>' 10\n"
    )
    (tmp_path / "vocab.txt").write_bytes(world_vocabulary(tokenizer))
    copy = config.model_copy(update={"vocab_file": str(tmp_path / "vocab.txt")})
    assert tokenizer_identity(build_tokenizer(copy)) == tokenizer_identity(tokenizer)
    with pytest.raises(VocabularyError, match="are not those of rwkv_vocab"):
        build_tokenizer(copy.model_copy(update={"added_tokens": CHAT[:1]}))
    described = describe_tokenizer(tokenizer)
    assert (described.type, described.added_tokens) == ("world", CHAT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"added_tokens": ["a"]}, "added_tokens is set.*'byte'"),
        ({"type": "world", "added_tokens": ["a", ""]}, "added_tokens .*empty"),
        ({"type": "world", "added_tokens": ["a", "b", "a"]}, "added_tokens has 'a' twice"),
        ({"type": "hf"}, "'hf' but path.*tokenizer.json"),
        ({"type": "hf", "path": "x", "vocab_file": "y"}, "vocab_file is set.*'hf'"),
        ({"type": "world", "path": "x"}, "path is set.*'world'"),
    ],
)
def test_fields_that_a_type_does_not_take(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**fields)
