import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_cluster.data.inputs import readers
from rwkv_cluster.data.inputs.readers import BadLine, array_values, as_array, line_blocks, npy_values, parse_line
from rwkv_cluster.data.inputs.sources import source_at
from rwkv_cluster.errors import DataError


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    return [line for block in line_blocks(source_at(path)) for line in block.lines()]


@pytest.mark.parametrize(
    ("line", "document"),
    [
        (b'{"text": "a b"}', "a b"),
        (b'{"text": ""}', ""),
        (b'{"text": [1, 2]}', [1, 2]),
        (b'{"text": []}', []),
        (b'{"x": {"text": 1}, "text": "a", "y": null}', "a"),
        (b'{"text": "first", "text": "last"}', "last"),
        (b'{"text": "\\u0000"}', "\0"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
        ('{"text": "é\u2028"}'.encode(), "é\u2028"),
    ],
)
def test_lines_that_are_documents(line, document):
    assert parse_line(line, "text") == document


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate encoded on its own
        (b'{"text": "a\0b"}', r"zero byte \(NUL\) at byte 11"),
        (b'{"text": "a\tb"}', r"control character or one that cannot be seen, U\+0009 at character 12"),
        ('\u200b{"text": "a"}'.encode(), r"one that cannot be seen, U\+200B at character 1"),
        (b'\xef\xbb\xbf{"text": "a"}', r"byte order mark \(BOM\)"),
        (b'{"text": "a"}\r{"text": "b"}', r"carriage return \(CR\)"),
        (b'\x1e{"text": "a"}', "record separator"),
        (b'{"text": "a"},', "a comma after"),
        (b'{"text": "a"}{"text": "b"}', "several objects"),
        (b"{", "of several lines"),
        (b'{"text":', "of several lines"),
        (b"[", "of a JSON array"),
        (b'[{"text": "a"},', "of a JSON array"),
        (b'[{"text": "a"}, {"text": "b"}]', "is a JSON array; JSONL has one"),
        (b"{'text': 'a'}", r"Python prints.*json\.dumps"),
        (b'{"text": "a", "x": None}', "what Python prints"),
        ("{\u201ctext\u201d: 1}".encode(), "typographic quote \u201c at character 2"),
        (b"", "not JSON"),
        (b'{"text": "a"', "not JSON"),
        (b"text", "not JSON"),
        (b'{"text": "a"} b', "not JSON: Extra data"),
        (b'{"text": "a", "x": NaN}', "NaN is not JSON"),
        (b'{"text": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text":' * 100_000, "nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "too many digits|is a number"),
        (b'{"text": "\\ud800"}', r"lone surrogate, U\+D800"),
        (b'{"text": "x\\uDC00y"}', r"lone surrogate, U\+DC00"),
        (b'{"txt": "a"}', r'no field "text" \(it has "txt"\)'),
        (b"{}", "has no fields|it has no fields"),
        (b'{"text": 5}', r'"text" is a number.*string.*list of integers'),
        (b'{"text": null}', '"text" is null'),
        (b'{"text": {"a": 1}}', '"text" is an object'),
        (b'{"text": true}', '"text" is a boolean'),
        (b'{"text": [1, 2.0]}', "number.* at index 1"),
        (b'{"text": [true]}', "boolean.* at index 0"),
        (b'{"text": [[1]]}', "array.* at index 0"),
        (b"[1, 2]", "is an array, expected an object"),
        (b'"text"', "is a string, expected an object"),
    ],
)
def test_lines_that_are_refused(line, reason):
    with pytest.raises(BadLine, match=reason):
        parse_line(line, "text")


@settings(max_examples=120, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
        st.text(alphabet='{}[]":,\\ud8fe0text19.eE-NaN ', max_size=40).map(str.encode),
    )
)
def test_any_line_is_a_document_or_a_bad_line(line):
    try:
        document = parse_line(line, "text")
    except BadLine:
        return
    assert isinstance(document, str) or all(type(value) is int for value in document)
    if isinstance(document, str):
        document.encode()


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_lines_are_split_at_lf_only_and_numbered(tmp_path, compress):
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf one\r\n\n \t\r\ntwo\x0b\xc2\x85\nlast"))
    assert read_lines(path) == [(1, b"one"), (4, b"two\x0b\xc2\x85"), (5, b"last")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.integers(0, 40), max_size=12),
    limit=st.integers(1, 30),
    step=st.integers(1, 50),
    last_newline=st.booleans(),
)
def test_long_lines_are_reported_alone(tmp_path, monkeypatch, lines, limit, step, last_newline):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", limit)
    content = b"\n".join(b"x" * length for length in lines) + (b"\n" if last_newline else b"")
    pieces = [content[start : start + step] for start in range(0, len(content), step)]
    monkeypatch.setattr(readers, "read_blocks", lambda source, digest: iter(pieces))
    path = tmp_path / "a.jsonl"
    path.touch()
    blocks = list(line_blocks(source_at(path)))
    short = [line for block in blocks for line in block.lines()]
    assert short == [(number, b"x" * length) for number, length in enumerate(lines, 1) if 0 < length <= limit]
    too_long = [block.first_line for block in blocks if block.too_long]
    assert too_long == [number for number, length in enumerate(lines, 1) if length > limit]


def test_a_line_over_the_limit_takes_little_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "' + b"x" * (80 << 20) + b'"}\n{"text": "b"}\n'))
    tracemalloc.start()
    try:
        blocks = list(line_blocks(source_at(path)))
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    assert [block.too_long for block in blocks] == [True, False]
    assert list(blocks[1].lines()) == [(2, b'{"text": "b"}')]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_an_error_that_names_the_file(tmp_path, suffix):
    whole = {"gz": gzip.compress, "zst": zstandard.compress}[suffix](b'{"text": "abc"}\n' * 1000)
    path = tmp_path / f"a.jsonl.{suffix}"
    for content in (whole[:-1], whole[:-6], whole[: len(whole) // 2], b"not compressed", whole + b"\x01\x02"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: "):
            read_lines(path)
    path.write_bytes(whole + whole)
    assert len(read_lines(path)) == 2000  # files of several members are read to their end


def rows(blocks) -> list[list[int]]:
    return [row.tolist() for values in blocks for row in values.rows]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9])
def test_one_dimension_is_cut_and_the_rest_kept(n, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK_VALUES", 4)
    array = np.arange(n)
    expected = [list(range(start, min(start + 3, n))) for start in range(0, n, 3)]
    assert rows(array_values(array, "a", 3)) == expected
    np.save(tmp_path / "a.npy", array)
    assert rows(npy_values(tmp_path / "a.npy", "a", 3)) == expected


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["int8", "uint16", ">i4", "int64", "float32"])
def test_rows_of_two_dimensions(tmp_path, monkeypatch, order, dtype):
    monkeypatch.setattr(readers, "_BLOCK_VALUES", 7)
    array = np.arange(15).reshape(5, 3).astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    assert rows(array_values(array[:, ::-1], "a", 9)) == array[:, ::-1].tolist()
    assert rows(npy_values(tmp_path / "a.npy", "a", 9)) == array.tolist()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([True]), "booleans"),
        (np.array(["1"]), r"holds text \(dtype <U1\)"),
        (np.array([b"1"]), r"holds text \(dtype \|S1\)"),
        (np.array([None]), "holds Python objects, the first a NoneType"),
        (np.array(5), r"shape \(\)"),
        (np.zeros((1, 1, 1), int), "1 or 2 dimensions"),
        (np.zeros((3, 0), int), "is empty"),
        (np.array([1j]), "dtype complex128"),
    ],
)
def test_arrays_that_are_refused(array, reason):
    with pytest.raises(DataError, match=reason):
        list(array_values(array, "array 1", 4))


def test_npy_files_that_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[:50], whole[:-8], b"\x93NUMPY\x09" + whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npy: "):
            list(npy_values(path, str(path), 10))
    np.save(path, np.array([[1, 2], [3]], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy holds Python objects, .* write rows of different lengths as JSONL"):
        list(npy_values(path, str(path), 10))
    np.savez(tmp_path / "b.npz", np.arange(3))
    with pytest.raises(DataError, match=r"b\.npz is an \.npz archive"):
        list(npy_values(tmp_path / "b.npz", str(tmp_path / "b.npz"), 10))


def test_what_no_array_can_hold_is_refused():
    masked = np.ma.masked_equal([1, 2, 2], 2)
    with pytest.raises(DataError, match=r"array 1 .* 2 masked values"):
        as_array(masked, "array 1")
    assert as_array(np.ma.masked_equal([1, 2], 9), "a").tolist() == [1, 2]
    with pytest.raises(DataError, match="rows of different lengths"):
        as_array([[1, 2], [3]], "a")
    with pytest.raises(DataError, match=r"a, a Tensor, .*detach"):
        as_array(torch.ones(3, requires_grad=True), "a")
    with pytest.raises(DataError, match=r"a, a Tensor, .*NumPy array"):
        as_array(torch.ones(3, dtype=torch.bfloat16), "a")
