"""Vocabulary files: the grammar, every fault with its line, and nothing that is ever executed."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import world_file

from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.tokenizer.vocabulary import (
    MAX_TOKEN_BYTES,
    MAX_TOKEN_ID,
    VocabularyError,
    create_vocab_file_from_tokens,
    parse_vocabulary,
    parse_vocabulary_lines,
    vocabulary_digest,
    vocabulary_line,
    write_vocabulary,
)


def parse(content: bytes) -> dict[int, bytes]:
    return parse_vocabulary_lines(content.split(b"\n"), "v.txt")


def test_world_vocabulary_has_the_published_shape():
    tokens = parse_vocabulary(world_file())
    assert sorted(tokens) == list(range(1, 65_530))
    assert [tokens[byte + 1] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert len(set(tokens.values())) == 65_529
    assert max(map(len, tokens.values())) == 128
    not_utf8 = sum(token.decode("utf-8", "ignore").encode() != token for token in tokens.values())
    assert not_utf8 == 486


def test_world_vocabulary_written_again_is_the_same_text(tmp_path: Path):
    source = world_file()
    write_vocabulary(tmp_path / "again.txt", parse_vocabulary(source).items())
    assert (tmp_path / "again.txt").read_bytes() == source.read_bytes().replace(b"\r\n", b"\n")


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (b"1 'a' 1\n2 b'\\xff' 1\n", {1: b"a", 2: b"\xff"}),
        (b"1 'a' 1\r\n2 \"b'\" 2\r\n", {1: b"a", 2: b"b'"}),
        (b"1 'a' 1\n2 'b' 1", {1: b"a", 2: b"b"}),
        (b"\xef\xbb\xbf1 'a' 1\n", {1: b"a"}),
        (b"# comment\n\n  \n7 ' a  b ' 6\n", {7: b" a  b "}),
        (b"0 '' 0\n1 '0' 1\n", {0: b"", 1: b"0"}),
        (b"0 b'\\x00' 1\n1 '\\x00' 1\n", {0: b"\0", 1: b"\0"}),
        ("1 '\\u4f60好' 6\n".encode(), {1: "你好".encode()}),
        (b"1 r'\\n' 2\n2 '\\n' 1\n3 '\\d' 2\n", {1: b"\\n", 2: b"\n", 3: b"\\d"}),
        (b"1 '\\'' 1\n2 '\\\\' 1\n3 '# ' 2\n", {1: b"'", 2: b"\\", 3: b"# "}),
        ("1 '\u2028' 3\n2 '\x85' 2\n".encode(), {1: "\u2028".encode(), 2: "\x85".encode()}),
        (b"1  'a'  1 \n5 'b' 1\n", {1: b"a", 5: b"b"}),
    ],
)
def test_accepted_lines(content: bytes, tokens: dict[int, bytes]):
    assert parse(content) == tokens


FAULTS = {
    "call": b"__import__('os').system('touch canary') 1",
    "call in the length": b"'a' open('canary','w').close()",
    "lambda": b"(lambda:open('canary','w'))() 1",
    "f-string": b'f\'{open("canary", "w")}\' 1',
    "f-string, bytes first": b"bf'{1}' 1",
    "t-string": b"t'{1}' 1",
    "concatenation": b"'a' 'b' 2",
    "sum": b"'a'+'b' 2",
    "product": b"'a'*1000000000 1000000000",
    "join": b"''.join(['a']) 1",
    "triple quotes": b"'''a''' 1",
    "parentheses": b"('a') 1",
    "nested parentheses": b"(" * 100_000 + b"'a'" + b")" * 100_000 + b" 1",
    "list": b"['a'] 1",
    "number": b"97 1",
    "long number": b"9" * 1_000_000 + b" 1",
    "long length": b"'a' " + b"9" * 1_000_000,
    "name": b"a 1",
    "no literal": b"1",
    "only spaces between": b" " * 100_000 + b"1",
    "unterminated": b"'a 2",
    "wrong quotes": b"'a\" 1",
    "bare escape at the end": b"'a\\' 2",
    "bad escape": b"'\\x4' 1",
    "bad name": b"'\\N{NO SUCH LETTER}' 1",
    "surrogate": b"'\\ud800' 3",
    "character in bytes": "b'é' 2".encode(),
    "NUL byte": b"'a\0b' 3",
    "carriage return inside": b"'a\rb' 3",
    "continuation": b"'a\\\rb' 2",
    "wrong length": b"'<|endoftext|>' 14",
    "negative length": b"'a' -1",
    "length with underscore": b"'a' 1_0",
    "float length": b"'a' 1.0",
    "other digits": "'a' １".encode(),
    "empty": b"'' 0",
    "not UTF-8": b"'\xff' 1",
    "too long": b"'" + b"a" * (MAX_TOKEN_BYTES + 1) + b"' %d" % (MAX_TOKEN_BYTES + 1),
    "far too long": b"'" + b"a" * 5_000_000 + b"' 5000000",
    "comment behind": b"'a' 1 # a",
    "semicolon": b"'a';open('canary','w') 1",
    "duplicate token": b"'first' 5",
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_line_is_refused_by_number_and_never_executed(fault: bytes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VocabularyError, match=r"^v\.txt:4: ") as error:
        parse(b"# header\n1 'first' 5\n\n2 " + fault + b"\n3 'last' 4\n")
    assert error.value.line == 4
    assert len(str(error.value)) < 400
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "id_text",
    [b"1", b"-2", b"+2", b"2.0", b"0x2", b"1_0", b"9" * 1_000_000, b"%d" % (MAX_TOKEN_ID + 1), b"a"],
)
def test_a_faulty_id_is_refused_by_line_number(id_text: bytes):
    with pytest.raises(VocabularyError, match=r"^v\.txt:2: "):
        parse(b"1 'first' 5\n" + id_text + b" 'b' 1\n")


def test_a_wrong_length_is_explained_in_one_sentence():
    with pytest.raises(VocabularyError) as error:
        parse(b"1 '<|endoftext|>' 14\n")
    assert str(error.value).startswith("v.txt:1: ")
    assert all(text in str(error.value) for text in ("'<|endoftext|>'", "13 bytes", "says 14"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only\n", b"0 b'\\x00' 1\n"])
def test_a_vocabulary_without_tokens_is_refused(content: bytes):
    with pytest.raises(VocabularyError, match="no token in it"):
        parse(content)


def test_missing_file_and_directory(tmp_path: Path):
    with pytest.raises(MissingDataError, match="does not exist"):
        parse_vocabulary(tmp_path / "none.txt")
    with pytest.raises(DataError, match="cannot be read"):
        parse_vocabulary(tmp_path)


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(VocabularyError("v.txt:4: wrong", 4)))
    assert (str(error), error.line) == ("v.txt:4: wrong", 4)


def test_create_vocab_file_from_tokens_has_the_known_layout(tmp_path: Path):
    path = tmp_path / "v.txt"
    create_vocab_file_from_tokens(["hello", b"\xff", " ", "é\n"], path)
    assert path.read_text() == "0 b'\\x00' 1\n1 'hello' 5\n2 b'\\xff' 1\n3 ' ' 1\n4 'é\\n' 3\n"
    assert parse_vocabulary(path) == {0: b"\0", 1: b"hello", 2: b"\xff", 3: b" ", 4: "é\n".encode()}


@pytest.mark.parametrize("tokens", [["a", b"a"], ["a", ""], ["\ud800"], [], ["a", 1]])
def test_create_vocab_file_refuses_what_could_not_be_loaded(tokens: list, tmp_path: Path):
    with pytest.raises(VocabularyError):
        create_vocab_file_from_tokens(tokens, tmp_path / "v.txt")
    assert not list(tmp_path.iterdir())


def test_digest_depends_on_ids_and_bytes_and_not_on_order():
    digest = vocabulary_digest({1: b"ab", 2: b"c"})
    assert digest == vocabulary_digest({2: b"c", 1: b"ab"})
    assert digest not in (vocabulary_digest({1: b"a", 2: b"bc"}), vocabulary_digest({1: b"c", 2: b"ab"}))


@given(st.dictionaries(st.integers(1, MAX_TOKEN_ID), st.binary(min_size=1, max_size=40), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(tokens: dict[int, bytes]):
    by_token = {token: token_id for token_id, token in tokens.items()}
    unique = {token_id: token for token, token_id in by_token.items()}
    assert parse("".join(vocabulary_line(*entry) for entry in unique.items()).encode()) == unique


LINE_PARTS = [bytes([byte]) for byte in b"102 '\"\\brufx4a(\0\r"]
ODD_LINES = st.lists(st.sampled_from([*LINE_PARTS, b"\xff", b"\xc3\xa9"]), max_size=12).map(b"".join)


@given(ODD_LINES | st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_line_is_parsed_as_python_would_or_refused(line: bytes):
    line = line.replace(b"\n", b"")
    try:
        tokens = parse_vocabulary_lines([b"9 'known' 5", line], "v.txt")
    except VocabularyError as error:
        assert error.line == 2  # noqa: PT017 -- a refusal is one of the two right outcomes
        return
    tokens.pop(9)
    for token_id, token in tokens.items():
        text = line.decode().strip()
        literal = text[text.index(" ") : text.rindex(" ")].strip()
        value = ast.literal_eval(literal)
        assert token == (value.encode() if isinstance(value, str) else value)
        assert (token_id, len(token)) == (int(text[: text.index(" ")]), int(text[text.rindex(" ") :]))
