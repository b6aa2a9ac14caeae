"""Tokenizers: published ids, greedy matching by its definition, both implementations alike, no lost text."""

# ruff: noqa: F401, F811 -- a pytest fixture is used by its name

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import compile_library, compiled_library, implementation, world_file

from rwkv_cluster.config import TokenizerConfig
from rwkv_cluster.errors import ConfigError, MissingDataError
from rwkv_cluster.tokenizer import (
    AngleTokenizer,
    BaseTokenizer,
    ByteTokenizer,
    GenericTokenizer,
    IntegerTokenizer,
    TokenizationError,
    VocabularyError,
    build_tokenizer,
    create_default_vocab_file,
    create_vocab_file_from_tokens,
    decode_for_display,
    encode_to_array,
    save_vocab,
    tokenizer_identity,
    trie_matcher,
)

WORLD_VECTORS = [
    ("Hello world!", [33155, 40213, 34]),
    ("\n\nUser: hi\n\nAssistant:", [261, 24281, 59, 4571, 261, 5585, 41693, 59]),
    ("你好，世界", [10464, 11685, 19137, 10267, 14610]),
    ("🙂 café\t\t", [3319, 2417, 37946, 257]),
]
AB = st.text("ab", min_size=1, max_size=5)
SOUP = "👩‍👩‍👧‍👦 e\u0301 नि ﷽ 각 \r\n\t\x00 🏳️‍🌈 Ａ\u200b中文 ĳ שָׁ "


@pytest.fixture(scope="module")
def world() -> GenericTokenizer:
    return GenericTokenizer(world_file())


def generic(tmp_path: Path, tokens: list[str | bytes]) -> GenericTokenizer:
    create_vocab_file_from_tokens(tokens, tmp_path / "vocab.txt")
    return GenericTokenizer(tmp_path / "vocab.txt")


def matchers(tokens: dict[int, bytes]):
    return trie_matcher.NativeMatcher(tokens, compiled_library()), trie_matcher.PythonMatcher(tokens)


def longest_match(tokens: dict[int, bytes], data: bytes) -> tuple[list[int], int]:
    """Greedy longest match by its definition: at each position the longest of all tokens that fit."""
    found, position = [], 0
    while position < len(data):
        fitting = [(len(t), i) for i, t in tokens.items() if i != 0 and t and data.startswith(t, position)]
        if not fitting:
            return [], position
        length, token_id = max(fitting)
        found.append(token_id)
        position += length
    return found, -1


def test_world_vectors(implementation):
    tokenizer = GenericTokenizer(world_file())
    assert tokenizer.vocab_size == 65_530
    for text, ids in WORLD_VECTORS:
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode_to_array(text).tolist() == ids
        assert tokenizer.encode_to_array(text).dtype == np.uint16
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def published():
    """The `rwkv` package's own tokenizer of the World vocabulary."""
    return pytest.importorskip("rwkv.rwkv_tokenizer").TRIE_TOKENIZER(str(world_file()))


@pytest.mark.system
def test_world_ids_equal_those_of_the_rwkv_package(implementation, published):
    text = Path(os.__file__).read_text()[:20_000] + SOUP * 20 + "".join(map(chr, range(0x20, 0x3000)))
    ours = GenericTokenizer(world_file()).encode_to_array(text)
    assert ours.tolist() == published.encode(text)


def test_readme_example_of_greedy_matching(implementation, tmp_path: Path):
    tokenizer = generic(tmp_path, ["hello", "world", " ", "!"])
    assert tokenizer.encode("hello world!") == [1, 3, 2, 4]
    assert tokenizer.decode([1, 3, 2, 4]) == "hello world!"
    assert tokenizer.vocab_size == 5
    assert (tokenizer.idx2token[2], tokenizer.token2idx[b"!"]) == (b"world", 4)


def test_what_no_token_fits_is_an_error_with_its_byte_position(implementation, tmp_path: Path):
    tokenizer = generic(tmp_path, ["abc", "ab", "é", "d"])
    assert tokenizer.encode("abab") == [2, 2]
    for text, position in [("abcé?", 5), ("x", 0), ("éa", 2), ("abd\0", 3), ("dabca", 4)]:
        for encode in (
            tokenizer.encode,
            tokenizer.encode_to_array,
            lambda text: tokenizer.encodeBytes(text.encode()),
        ):
            with pytest.raises(TokenizationError, match=rf"^byte {position}: ") as error:
                encode(text)
            assert error.value.byte_position == position


def test_text_is_never_encoded_as_end_of_document(implementation, tmp_path: Path):
    with pytest.raises(TokenizationError):
        generic(tmp_path, ["a"]).encode("a\0a")
    every_byte = generic(tmp_path, [bytes([byte]) for byte in range(256)])
    assert every_byte.encode("a\0a") == [98, 1, 98]
    assert every_byte.decode([98, 1, 98, 0]) == "a\0a\0"


def test_decode_drops_unknown_ids_and_marks_invalid_utf8(implementation, tmp_path: Path):
    tokenizer = generic(tmp_path, ["a", b"\xf0\x9f", b"\x99\x82"])
    assert tokenizer.decode([1, -1, 99, 2**40, 1]) == "aa"
    assert tokenizer.decode([1, 2, 3]) == "a🙂"
    assert tokenizer.decode([1, 2]) == "\ufffd"
    assert tokenizer.decodeBytes([2, 1]) == b"\xf0\x9fa"
    assert tokenizer.decodeBytes(np.array([1, 2, 3], np.uint16)) == "a🙂".encode()
    assert tokenizer.decode([]) == ""
    assert decode_for_display(tokenizer, [1, 2]) == "a\ufffd"
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])


def test_ids_above_65535_are_int32(implementation, tmp_path: Path):
    (tmp_path / "v.txt").write_text("1 'a' 1\n65536 'b' 1\n8388607 'ab' 2\n")
    tokenizer = GenericTokenizer(tmp_path / "v.txt")
    ids = tokenizer.encode_to_array("aabb")
    assert (ids.tolist(), ids.dtype) == ([1, 8_388_607, 65_536], np.int32)
    assert tokenizer.decode(ids) == "aabb"


def test_long_tokens_need_no_recursion(implementation, tmp_path: Path):
    tokenizer = generic(tmp_path, ["a" * 65_535, "a", "b" * 3_000])
    assert tokenizer.encode("a" * 65_536 + "b" * 3_000) == [1, 2, 3]


def test_the_trie_of_the_world_vocabulary_is_small():
    native, _ = matchers(GenericTokenizer(world_file()).idx2token)
    assert native.cells.nbytes < 2_000_000


def test_a_vocabulary_too_dense_for_the_first_guess_is_built_with_more_room():
    tokens = {1 + i: bytes([i]) for i in range(250)}
    tokens.update({251 + i: bytes([i, (i * 37) % 256]) for i in range(256)})
    data = random.Random(0).randbytes(2_000)
    native, python = matchers(tokens)
    assert native.encode(data, np.uint16)[0].tolist() == python.encode(data, np.uint16)[0].tolist()


@given(
    st.lists(
        st.binary(min_size=1, max_size=6) | st.text("ab", min_size=1, max_size=5).map(str.encode),
        min_size=1,
        max_size=40,
    ),
    st.binary(max_size=40) | st.text("ab", max_size=40).map(str.encode),
    st.lists(st.integers(0, 40), max_size=20),
)
@settings(max_examples=300, deadline=None)
def test_both_matchers_equal_the_definition(vocabulary: list[bytes], noise: bytes, choice: list[int]):
    tokens = dict(enumerate(dict.fromkeys(vocabulary), start=1))
    for data in (noise, b"".join(vocabulary[i % len(vocabulary)] for i in choice)):
        expected, position = longest_match(tokens, data)
        for matcher in matchers(tokens):
            for dtype in (np.uint16, np.int32):
                ids, fault = matcher.encode(data, dtype)
                assert (ids.tolist(), fault, ids.dtype) == (expected, position, dtype)
            assert position >= 0 or matcher.decode(ids) == data


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_bytes(world: GenericTokenizer, data: bytes):
    assert world.decodeBytes(world.encodeBytes(data)) == data
    assert ByteTokenizer().decodeBytes(ByteTokenizer().encodeBytes(data)) == data


@given(st.text(max_size=60) | st.lists(st.sampled_from(SOUP), max_size=60).map("".join))
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_text(world: GenericTokenizer, text: str):
    for tokenizer in (world, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_to_array(text).tolist() == tokenizer.encode(text)


def test_pickling_carries_the_tokens_and_not_the_trie(world: GenericTokenizer, tmp_path: Path):
    pickled = pickle.dumps(world)
    assert len(pickled) < 1_000_000
    assert pickle.loads(pickled).encode("Hello world!") == [33155, 40213, 34]
    copy = pickle.loads(pickle.dumps(generic(tmp_path, ["a"])))
    (tmp_path / "vocab.txt").unlink()
    assert pickle.loads(pickle.dumps(copy)).encode("aa") == [1, 1]


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(TokenizationError("byte 3: wrong", 3)))
    assert (str(error), error.byte_position) == ("byte 3: wrong", 3)


def test_print_tokens(tmp_path: Path, capsys):
    generic(tmp_path, ["a", b"\xff"]).printTokens([1, 2])
    assert capsys.readouterr().out == "'a'1 b'\\xff'2 \n"


def test_a_library_of_another_version_is_not_used(tmp_path: Path, monkeypatch, caplog):
    library = tmp_path / trie_matcher.LIBRARY
    compile_library(library)
    monkeypatch.setattr(trie_matcher, "__file__", str(tmp_path / "trie_matcher.py"))
    assert trie_matcher.library.__wrapped__() is not None
    monkeypatch.setattr(trie_matcher, "VERSION", -1)
    assert trie_matcher.library.__wrapped__() is None
    assert f"{library} belongs to another version" in caplog.text


def test_a_damaged_library_is_not_used(tmp_path: Path, monkeypatch, caplog):
    (tmp_path / trie_matcher.LIBRARY).write_bytes(b"\x7fELF not really")
    monkeypatch.setattr(trie_matcher, "__file__", str(tmp_path / "trie_matcher.py"))
    assert trie_matcher.library.__wrapped__() is None
    assert "no native tokenizer" in caplog.text


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert (tokenizer.encode("aé\0"), tokenizer.vocab_size) == ([98, 196, 170, 1], 257)
    assert tokenizer.encode_to_array("a").dtype == np.uint16
    assert tokenizer.decode([98, 0, 196, 170, 300, -1]) == "aé"
    assert tokenizer.decode([98, 196]) == "a\ufffd"


@pytest.mark.parametrize("make", [ByteTokenizer, IntegerTokenizer, AngleTokenizer])
def test_half_a_surrogate_pair_is_an_error_with_its_byte_position(make):
    with pytest.raises(TokenizationError, match="half a surrogate pair") as error:
        make().encode("1 é\ud800")
    assert error.value.byte_position == 4


def test_saved_vocabularies_load_again(tmp_path: Path, world: GenericTokenizer):
    path = tmp_path / "vocab.txt"
    IntegerTokenizer(20).save_vocab(path)
    assert path.read_text().splitlines()[:3] == ["0 '' 0", "1 '0' 1", "2 '1' 1"]
    assert IntegerTokenizer(vocab_file=path).max_value == 20
    AngleTokenizer().save_vocab(str(path))
    assert path.read_text().splitlines()[:2] == ["0 '\\x00' 1", "1 '0' 1"]
    assert AngleTokenizer(path).encode("359") == [360]
    assert create_default_vocab_file(path, max_value=5) == path
    assert IntegerTokenizer(vocab_file=path).vocab_size == 7
    ByteTokenizer().save_vocab(path)
    assert GenericTokenizer(path).encode(SOUP) == ByteTokenizer().encode(SOUP)
    world.save_vocab(path)
    assert tokenizer_identity(GenericTokenizer(path)) == tokenizer_identity(world)


def test_foreign_vocabularies_are_refused(tmp_path: Path):
    path = tmp_path / "vocab.txt"
    with pytest.raises(MissingDataError):
        IntegerTokenizer(vocab_file=path)
    for content in ("1 'a' 1\n", "1 '0' 1\n3 '2' 1\n"):
        path.write_text(content)
        with pytest.raises(VocabularyError, match="vocabulary of integers"):
            IntegerTokenizer(vocab_file=path)
    create_default_vocab_file(path, 12)
    with pytest.raises(VocabularyError, match="needs 0 to 359"):
        AngleTokenizer(path)


class Reversed:
    """A user's tokenizer: only what must be there."""

    vocab_size = 200

    def __init__(self, vocab_file: Path | None = None) -> None:
        self.vocab_file = vocab_file

    def encode(self, src: str) -> list[int]:
        return [ord(character) for character in src]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


class Upper(ByteTokenizer):
    """Overrides encode alone, so the inherited fast path must not be taken."""

    def encode(self, src: str) -> list[int]:
        return super().encode(src.upper())


class Refusing(Reversed):
    def encode(self, src: str) -> list[int]:
        raise ValueError("not today")


class Floats(Reversed):
    def encode(self, src: str) -> list[float]:
        return [1.0]


def test_a_users_class_needs_three_members(tmp_path: Path):
    ids = encode_to_array(Reversed(), "az")
    assert (ids.tolist(), ids.dtype) == ([97, 122], np.uint16)
    assert encode_to_array(Reversed(), "").tolist() == []
    assert decode_for_display(Reversed(), [97]) == "a"
    save_vocab(Reversed(), tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text().endswith("test_tokenizer:Reversed, 200 ids\n")
    assert encode_to_array(Upper(), "a").tolist() == [66]


@pytest.mark.parametrize(
    ("made", "text", "message"),
    [
        (Reversed(), "aé", r"Reversed\.encode returned id 233 at index 1, outside 0 to 199"),
        (Refusing(), "a", "Refusing cannot encode the text: not today"),
        (Floats(), "a", "a list of integers"),
    ],
)
def test_what_a_users_class_returns_is_checked(made, text: str, message: str):
    with pytest.raises(TokenizationError, match=message):
        encode_to_array(made, text)


def test_a_subclass_of_the_base_gets_a_vocabulary_file(tmp_path: Path):
    class Own(BaseTokenizer):
        vocab_size = 3

        def encode(self, src):
            return [1]

        def decode(self, tokens):
            return ""

    save_vocab(Own(), tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text().startswith("# ")
    with pytest.raises(TypeError):
        BaseTokenizer()


def test_identities_tell_tokenizers_apart(tmp_path: Path):
    made = [
        ByteTokenizer(),
        IntegerTokenizer(5),
        IntegerTokenizer(359),
        AngleTokenizer(),
        generic(tmp_path, ["a", "bc"]),
        generic(tmp_path, ["ab", "c"]),
        Reversed(),
        Upper(),
    ]
    identities = [json.dumps(tokenizer_identity(each), sort_keys=True) for each in made]
    assert len(set(identities)) == len(made)
    assert identities == [json.dumps(tokenizer_identity(each), sort_keys=True) for each in made]
    assert tokenizer_identity(IntegerTokenizer(5)) == {
        "class": "IntegerTokenizer",
        "vocab_size": 7,
        "sha256": tokenizer_identity(IntegerTokenizer(5))["sha256"],
    }


def test_build_tokenizer(tmp_path: Path, monkeypatch):
    create_vocab_file_from_tokens(["a"], tmp_path / "v.txt")
    assert isinstance(build_tokenizer(TokenizerConfig()), ByteTokenizer)
    assert build_tokenizer(TokenizerConfig(type="integer", max_value=7)).max_value == 7
    assert isinstance(build_tokenizer(TokenizerConfig(type="angle")), AngleTokenizer)
    assert build_tokenizer(TokenizerConfig(type="generic", vocab_file=str(tmp_path / "v.txt"))).encode("a") == [1]
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    assert isinstance(build_tokenizer(TokenizerConfig(type="mine:Reversed")), Reversed)
    assert build_tokenizer(TokenizerConfig(type="mine:Reversed", vocab_file="v")).vocab_file == Path("v")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module_here:Tokenizer", "cannot be imported"),
        (":Tokenizer", "cannot be imported"),
        ("json:Tokenizer", "module json has no class 'Tokenizer'"),
        ("json:", "module json has no class ''"),
        ("collections:OrderedDict", "has no encode and no decode"),
        ("codecs:Codec", "codecs:Codec has no vocab_size"),
        ("os:system", "which is a builtin_function_or_method and no class"),
        ("builtins:eval", "which is a builtin_function_or_method and no class"),
        ("subprocess:getoutput", "which is a function and no class"),
        ("subprocess:Popen", "has no encode and no decode"),
        ("os:environ", "which is a _Environ and no class"),
        (".relative:Tokenizer", "cannot be imported: TypeError"),
        ("rwkv_cluster.tokenizer.base:BaseTokenizer", "cannot be made without an argument: TypeError"),
    ],
)
def test_a_users_class_that_cannot_be_had_is_a_configuration_error(reference: str, message: str):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(TokenizerConfig(type=reference))


def test_what_is_no_tokenizer_class_is_never_called(tmp_path: Path):
    for reference in ("os:system", "os:popen", "subprocess:Popen", "builtins:exec"):
        with pytest.raises(ConfigError):
            build_tokenizer(TokenizerConfig(type=reference, vocab_file=f"touch {tmp_path}/called"))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("size", [0, "200", 2.5, True, lambda: 200])
def test_a_vocab_size_that_is_no_number_of_ids_is_refused(size: object, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    monkeypatch.setattr(Reversed, "vocab_size", size)
    with pytest.raises(ConfigError, match=r"vocab_size of .*integer >= 1"):
        build_tokenizer(TokenizerConfig(type="mine:Reversed"))


def test_a_class_that_fails_or_sets_its_vocab_size_itself(monkeypatch):
    def fail(self: Reversed, vocab_file: Path | None = None) -> None:
        raise KeyError("no model here")

    def grow(self: Reversed, vocab_file: Path | None = None) -> None:
        self.vocab_size = 300

    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    monkeypatch.setattr(Reversed, "__init__", grow)
    assert build_tokenizer(TokenizerConfig(type="mine:Reversed")).vocab_size == 300
    monkeypatch.setattr(Reversed, "__init__", fail)
    with pytest.raises(ConfigError, match="cannot be made with vocab_file 'v': KeyError: 'no model here'"):
        build_tokenizer(TokenizerConfig(type="mine:Reversed", vocab_file="v"))


def test_the_fallback_says_so(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(trie_matcher, "__file__", str(tmp_path / "trie_matcher.py"))
    with caplog.at_level("WARNING", "rwkv_cluster"):
        assert trie_matcher.library.__wrapped__() is None
    assert "no native tokenizer: it was not built" in caplog.text
