"""Each part of a text is given as soon as it is certain: whole characters, and nothing of what ends the answer."""

from __future__ import annotations

import pytest

from rwkv_cluster.chat.text_stream import TextStream
from rwkv_cluster.tokenizer import ByteTokenizer, IntegerTokenizer

BYTES = ByteTokenizer()


def parts(said: str, stop: str = "\n\nUser:", beginning: str = "") -> list[str]:
    """What `take` gives after each byte, and at the end."""
    stream = TextStream(BYTES, stop, beginning)
    taken = []
    for token in BYTES.encode(said):
        stream.add(token)
        taken.append(stream.take())
        if stream.is_over:
            break
    return [*taken, stream.take(everything=True)]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (" Hello.", "Hello."),
        (" a\n\nb\n\nUser: c", "a\n\nb"),
        (" a\n\nUs", "a\n\nUs"),
        (" é€😀 x", "é€😀 x"),
        ("  \n", ""),
    ],
)
def test_the_parts_make_the_text(said: str, text: str) -> None:
    assert "".join(parts(said)) == text


def test_a_part_comes_at_once_unless_it_may_be_the_end() -> None:
    assert parts("ab\n\nUx") == ["a", "b", "", "", "", "\n\nUx", ""]
    assert parts("é") == ["", "é", ""]


def test_a_beginning_is_a_part_of_the_text() -> None:
    assert parts(">x", beginning=" <think") == ["<think>", "x", ""]


def test_bytes_that_are_no_character_do_not_hold_up_the_rest() -> None:
    stream = TextStream(BYTES)
    for byte in b"\xff" * 6 + b"abcd":
        stream.add(byte + 1)
    assert stream.text.endswith("abcd")


def test_numbers_keep_the_space_between() -> None:
    tokenizer = IntegerTokenizer(max_value=20)
    stream = TextStream(tokenizer)
    for token in tokenizer.encode("3 14 15"):
        stream.add(token)
    assert stream.take(everything=True) == "3 14 15"


def test_an_id_that_the_tokenizer_has_not_says_nothing() -> None:
    stream = TextStream(BYTES)
    for token in (BYTES.vocab_size, 98, 300):
        stream.add(token)
    assert stream.text == "a"
