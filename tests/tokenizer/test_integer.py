"""Integers and angles as tokens: documented ids, both parsers alike, every fault with its place."""

# ruff: noqa: F401, F811 -- a pytest fixture is used by its name

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import compiled_library, implementation

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer import AngleTokenizer, IntegerTokenizer, TokenizationError
from rwkv_cluster.tokenizer import integer as integers


def test_documented_examples(implementation):
    integer, angle = IntegerTokenizer(max_value=999), AngleTokenizer()
    assert integer.encode_sequence([0, 100, 500, 999]) == [1, 101, 501, 1000]
    assert integer.encode("0 100 500 999") == [1, 101, 501, 1000]
    assert integer.decode([1, 101, 0, 1000]) == "0 100 999"
    assert integer.decode_sequence([1, 0, 2]) == [0, 1]
    assert (integer.vocab_size, IntegerTokenizer().vocab_size, angle.vocab_size) == (1001, 361, 361)
    assert angle.encode_angle_sequence([0, 45, 90]) == [1, 46, 91]
    assert angle.decode_angle_sequence([1, 46, 0, 91]) == [0, 45, 90]
    assert angle.decode(angle.encode("0 45 359")) == "0 45 359"
    assert (integer.idx2token[0], integer.token2idx[b"999"], angle.idx2token[0]) == (b"", 1000, b"\0")


INTEGER_FAULTS = [
    ("1 2 1.9", 4, "a whole number"),
    ("1.0", 0, "a whole number"),
    ("1 -3", 2, "is below 0"),
    ("-0", 0, "is below 0"),
    ("5 1000", 2, "is above 999"),
    ("1 " + "9" * 100_000, 2, "is above 999"),
    ("18446744073709551617", 0, "is above 999"),
    ("4294967297 1", 0, "is above 999"),
    ("hello 1", 0, "is not a number"),
    ("1 0x10", 2, "is not a number"),
    ("1_0", 0, "is not a number"),
    ("+1", 0, "is not a number"),
    ("1,2", 0, "is not a number"),
    ("é 1", 0, "is not a number"),
    ("1 ١", 2, "is not a number"),
    ("1\u00a02", 0, "is not a number"),
    ("1 2\0", 2, "is not a number"),
    ("nan", 0, "is not a number"),
    ("1e3", 0, "is not a number"),
]


@pytest.mark.parametrize(("text", "position", "what"), INTEGER_FAULTS, ids=[f[0][:12] for f in INTEGER_FAULTS])
def test_faulty_integers_are_errors_with_their_place(implementation, text: str, position: int, what: str):
    for encode in (IntegerTokenizer(999).encode, IntegerTokenizer(999).encode_to_array):
        with pytest.raises(TokenizationError, match=re.escape(what)) as error:
            encode(text)
        assert error.value.byte_position == position
        assert str(error.value).startswith(f"byte {position}: '")
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["360 1", "90180", "12a"])
def test_angles_never_fall_back_to_matching_digits(implementation, text: str):
    with pytest.raises(TokenizationError, match="0 to 359"):
        AngleTokenizer().encode(text)


def test_white_space_and_leading_zeros(implementation):
    assert IntegerTokenizer(9).encode("\t1\r\n 02\v\f3 ") == [2, 3, 4]
    assert IntegerTokenizer(9).encode("0" * 50 + "1") == [2]
    for blank in ("", "  \n"):
        ids = IntegerTokenizer(9).encode_to_array(blank)
        assert (ids.tolist(), ids.dtype) == ([], np.uint16)


def test_integer_types_by_vocabulary_size(implementation):
    for max_value, dtype in [(65_534, np.uint16), (65_535, np.int32), (8_000_000, np.int32)]:
        tokenizer = IntegerTokenizer(max_value)
        for ids in (tokenizer.encode_to_array(f"0 {max_value}"), tokenizer.encode_values([0, max_value])):
            assert (ids.tolist(), ids.dtype) == ([1, max_value + 1], dtype)
        assert tokenizer.decode(ids) == f"0 {max_value}"


@given(st.text(alphabet="0123456789 \n-.é", max_size=30), st.integers(0, 300))
@settings(max_examples=300, deadline=None)
def test_both_integer_parsers_agree_with_python(text: str, max_value: int):
    data, dtype = text.encode(), np.uint16
    words = text.split()
    good = all(re.fullmatch("[0-9]+", word) and int(word) <= max_value for word in words)
    native = integers.parse_native(data, max_value, dtype, compiled_library())
    numpy = integers.parse_numpy(data, max_value, dtype)
    assert native[0].tolist() == numpy[0].tolist() == ([int(word) + 1 for word in words] if good else [])
    assert native[1] == numpy[1]
    assert (native[1] == -1) == good


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint64])
def test_values_of_every_integer_type(dtype):
    ids = IntegerTokenizer(255).encode_values(np.array([0, 1, 127], dtype))
    assert (ids.tolist(), ids.dtype) == ([1, 2, 128], np.uint16)


def test_the_largest_value_of_a_type_does_not_wrap_around():
    assert IntegerTokenizer(255).encode_values(np.array([255], np.uint8)).tolist() == [256]
    assert IntegerTokenizer(65_535).encode_values(np.array([65_535], np.uint16)).tolist() == [65_536]


@pytest.mark.parametrize(
    "values",
    [
        [1, 10],
        [1, -1],
        [1, 1.5],
        [1, 1.0],
        [1, True],
        [1, "1"],
        [1, None],
        [1, 2**70],
        [1, float("nan")],
        np.array([1.0]),
        np.array([True]),
        np.array([[1]]),
        np.array([1, 2**64 - 1], np.uint64),
        np.array([1, -1], np.int8),
        np.array(["1"]),
    ],
)
def test_faulty_values_are_refused(values):
    for encode in (IntegerTokenizer(9).encode_sequence, IntegerTokenizer(9).encode_values):
        with pytest.raises(TokenizationError):
            encode(values)
    with pytest.raises(TokenizationError):
        AngleTokenizer().encode_angle_sequence([*list(values), 360])


@pytest.mark.parametrize("ids", [[11], [-1], [2**70], [1.5]])
def test_unknown_ids_are_refused(ids):
    for decode in (IntegerTokenizer(9).decode, IntegerTokenizer(9).decode_sequence):
        with pytest.raises(TokenizationError):
            decode(ids)


@pytest.mark.parametrize("max_value", [-1, 1.5, True, "9", 2**40])
def test_max_value_is_checked(max_value):
    with pytest.raises(ConfigError, match="max_value"):
        IntegerTokenizer(max_value)
