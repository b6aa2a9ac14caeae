import gzip
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from prepared_files import write_rows

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import TokenFileWriter, open_tokens
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.data.preparation import encode, shuffle_split, staleness, token_store, tokenize
from rwkv_cluster.data.preparation.prepare import prepare, reason_to_prepare, write_pair
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.tokenizer import (
    AngleTokenizer,
    ByteTokenizer,
    GenericTokenizer,
    IntegerTokenizer,
    create_vocab_file_from_tokens,
)

BYTES = ByteTokenizer()


def documents(prefix: Path) -> list[list[int]]:
    tokens = open_tokens(prefix)
    assert tokens.doc_idx.tolist() == list(range(len(tokens) + 1))
    return [tokens[item].tolist() for item in range(len(tokens))]


def encoded(text: str) -> list[int]:
    return [*BYTES.encode(text), 0]


def config(*inputs, **options) -> DataConfig:
    defaults = {"n_epochs_duplication": 1, "shuffle": False, "write_jsonl": False}
    return DataConfig(inputs=[str(entry) for entry in inputs], **(defaults | options))


def write_lines(path: Path, values, field="text") -> Path:
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    return path


def content(directory: Path) -> dict[str, bytes]:
    """Everything but the caches of time stamps and the lock."""
    caches = ("inputs.json", "verified.json", ".prepare.lock")
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in caches}


# Inputs


def test_arrays_become_documents_with_the_rest_kept(tmp_path):
    arrays = [np.arange(7), np.array([[1, 2], [3, 4]], np.int8)]
    manifest = prepare(config(sequence_length=3), IntegerTokenizer(9), tmp_path, arrays=arrays)
    assert documents(tmp_path / "train") == [[1, 2, 3, 0], [4, 5, 6, 0], [7, 0], [2, 3, 0], [4, 5, 0]]
    assert (manifest.n_tokens, manifest.n_documents, manifest.dtype, manifest.vocab_size) == (16, 5, "uint16", 11)


def test_every_kind_of_input_in_one_run_and_in_order(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    np.save(source / "a.npy", np.array([[7, 8]]))
    (source / "a.npy.zst").write_bytes(zstandard.compress((source / "a.npy").read_bytes()))
    write_lines(source / "b.jsonl", ["é", [5, 6], [5, 6, 0]])
    (source / "b.jsonl.gz").write_bytes(gzip.compress((source / "b.jsonl").read_bytes()))
    (source / "c.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (source / "c.txt.gz").write_bytes(gzip.compress(b"zipped"))
    with TokenFileWriter(source / "p", np.int32) as writer:
        writer.write(np.array([1, 2, 0, 3], np.int32), np.array([3, 1]))
    prepare(config(source), BYTES, tmp_path / "out", arrays=[np.array([9])])
    lines = [encoded("é"), [5, 6, 0], [5, 6, 0]]
    texts = [encoded("one\r\ntwo"), encoded("zipped")]
    expected = [[9, 0], [7, 8, 0], [7, 8, 0], *lines, *lines, *texts, [1, 2, 0], [3, 0]]
    assert documents(tmp_path / "out" / "train") == expected


def test_empty_documents_are_left_out_and_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", " \n\u2003", [], [0], "x"])
    (tmp_path / "empty.txt").write_bytes(b"")
    manifest = prepare(config(path, tmp_path / "empty.txt"), BYTES, tmp_path / "out")
    assert documents(tmp_path / "out" / "train") == [encoded("x")]
    assert (manifest.n_source_documents, manifest.n_empty_documents) == (1, 5)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("text", ["", "\n \n\t\r\n"])
def test_input_without_documents_is_an_error_that_names_it(tmp_path, name, text):
    data = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"no document .*{name}"):
        prepare(config(tmp_path / name), BYTES, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_input_at_all_and_missing_input(tmp_path):
    with pytest.raises(DataError, match="there is no input"):
        prepare(config(), BYTES, tmp_path)
    with pytest.raises(MissingDataError, match="does not exist"):
        prepare(config(tmp_path / "none"), BYTES, tmp_path)
    with pytest.raises(DataError, match="is empty"):
        prepare(config(), BYTES, tmp_path, arrays=[np.array([], int)])


def test_text_field_can_be_another(tmp_path):
    prepare(config(write_lines(tmp_path / "a.jsonl", ["x"], "body"), text_field="body"), BYTES, tmp_path / "out")
    assert documents(tmp_path / "out" / "train") == [encoded("x")]


def test_bad_line_is_an_error_with_its_place_or_skipped_and_counted(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": 5}\nnonsense\n{"text": "b"}\n')
    expected = r'a\.jsonl:3: "text" is a number.*string.*list of integers.*data\.skip_bad_lines'
    with pytest.raises(DataError, match=expected):
        prepare(config(path), BYTES, tmp_path / "out")
    manifest = prepare(config(path, skip_bad_lines=True), BYTES, tmp_path / "out")
    assert manifest.n_bad_lines == 2
    assert documents(tmp_path / "out" / "train") == [encoded("a"), encoded("b")]
    assert "2 lines were left out" in caplog.text


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match=r"a\.txt: .*UTF-8.* at byte 5"):
        prepare(config(path), BYTES, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([1, 2, -3, 4]), "array 1: index 2: -3 .*0 to 359"),
        (np.array([[1, 2], [3, 360]]), "array 1: row 1, column 1: 360 is out of range"),
        (np.array([1.0, 1.9]), r"array 1: index 1: 1\.9 "),
        (np.array([1.0, np.nan]), "index 1: nan "),
        (np.array([np.inf]), "index 0: inf "),
        (np.array([2**63], np.uint64), "index 0: 9223372036854775808 is out of range"),
        (np.array([True]), "booleans"),
    ],
)
def test_values_that_are_no_tokens_are_named(tmp_path, values, reason):
    with pytest.raises(DataError, match=reason):
        prepare(config(), IntegerTokenizer(), tmp_path, arrays=[values])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float16, np.int64, np.uint64, ">i2"])
def test_largest_values_of_small_types_do_not_wrap_around(tmp_path, dtype):
    values = np.array([0, 1, 127], dtype)
    prepare(config(), IntegerTokenizer(), tmp_path, arrays=[values])
    assert documents(tmp_path / "train") == [[1, 2, 128, 0]]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 257], r"a\.jsonl:2: index 1: 257 .*0 to 256"),
        ([-1], "index 0: -1 is out of range"),
        ([10**30], r"index 0: 1000\d+\.\.\. "),
        ([1.5], "number.* at index 0"),
    ],
)
def test_lists_in_jsonl_are_checked(tmp_path, value, reason):
    path = write_lines(tmp_path / "a.jsonl", ["x", value])
    with pytest.raises(DataError, match=reason):
        prepare(config(path), BYTES, tmp_path / "out")


def test_lists_in_jsonl_are_values_for_integer_and_angle_tokenizers(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [[0, 45, 90], "0 45 90"])
    for tokenizer in (IntegerTokenizer(), AngleTokenizer()):
        prepare(config(path), tokenizer, tmp_path / "out")
        assert documents(tmp_path / "out" / "train") == [[1, 46, 91, 0]] * 2


def test_text_that_cannot_be_encoded_names_document_and_byte(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    create_vocab_file_from_tokens(["a", "b"], vocabulary)
    path = write_lines(tmp_path / "a.jsonl", ["ab", "abxa"])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*2"):
        prepare(config(path), GenericTokenizer(vocabulary), tmp_path / "out")
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        prepare(config(path), IntegerTokenizer(), tmp_path / "out")


class WideTokenizer:
    """A user's class with no more than the three members that are asked for."""

    vocab_size = 1_200_000

    def encode(self, text):
        return [70_000 + ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(i - 70_000) for i in ids)


class LyingTokenizer(WideTokenizer):
    vocab_size = 300

    def encode_to_array(self, text):
        return np.array(self.encode(text), np.int64)


def test_any_class_and_ids_above_uint16(tmp_path):
    manifest = prepare(config(write_lines(tmp_path / "a.jsonl", ["ab"])), WideTokenizer(), tmp_path / "out")
    assert manifest.dtype == "int32"
    assert documents(tmp_path / "out" / "train") == [[70_097, 70_098, 0]]
    with pytest.raises(DataError, match="70097"):
        prepare(config(tmp_path / "a.jsonl"), LyingTokenizer(), tmp_path / "out2")


def test_vocabulary_of_65536_is_the_last_in_uint16(tmp_path):
    for max_value, dtype in ((65_534, "uint16"), (65_535, "int32")):
        out = tmp_path / dtype
        manifest = prepare(config(), IntegerTokenizer(max_value), out, arrays=[np.array([max_value])])
        assert manifest.dtype == dtype
        assert documents(out / "train") == [[max_value + 1, 0]]


def test_standard_library_is_read_without_errors(tmp_path):
    manifest = prepare(config("stdlib:", file_pattern="a*.py"), BYTES, tmp_path)
    assert manifest.n_source_documents > 5


# Order


def test_passes_are_shuffled_independently_and_completely(tmp_path):
    array = np.arange(50).reshape(50, 1)
    prepare(config(n_epochs_duplication=3, shuffle=True), IntegerTokenizer(), tmp_path, arrays=[array])
    values = [document[0] - 1 for document in documents(tmp_path / "train")]
    passes = [values[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(part) == list(range(50)) for part in passes)
    assert len({tuple(part) for part in [*passes, range(50)]}) == 4


def test_without_shuffle_the_order_is_kept_in_each_pass(tmp_path):
    prepare(config(n_epochs_duplication=2), IntegerTokenizer(), tmp_path, arrays=[np.arange(4).reshape(4, 1)])
    assert [document[0] - 1 for document in documents(tmp_path / "train")] == [0, 1, 2, 3] * 2


def test_the_order_for_a_seed_never_changes(tmp_path):
    """A reference for other versions and machines: PCG64's raw draws as sort keys."""
    array = np.arange(12).reshape(12, 1)
    prepare(config(shuffle=True, seed=7), IntegerTokenizer(), tmp_path, arrays=[array])
    values = [document[0] - 1 for document in documents(tmp_path / "train")]
    assert values == [3, 1, 10, 4, 5, 0, 2, 11, 8, 6, 7, 9]


@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("equal_lengths", [True, False])
def test_memory_limits_do_not_show_in_the_result(tmp_path, monkeypatch, fraction, shuffle, equal_lengths):
    rng = np.random.default_rng(0)
    lengths = np.full(300, 9) if equal_lengths else rng.integers(1, 60, 300)
    values = [rng.integers(0, 5, length).tolist() for length in lengths]
    path = write_lines(tmp_path / "a.jsonl", values)
    options = config(path, n_epochs_duplication=2, shuffle=shuffle, validation_fraction=fraction)
    prepare(options, IntegerTokenizer(), tmp_path / "whole")
    monkeypatch.setattr(token_store, "_HELD_BYTES", 500)
    monkeypatch.setattr(token_store, "_BLOCK_BYTES", 80)  # documents of more than 40 tokens count as large
    monkeypatch.setattr(token_store, "_BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(shuffle_split, "REGION_BYTES", 1500)
    monkeypatch.setattr(shuffle_split, "_OUTPUT_BYTES", 200)
    prepare(options, IntegerTokenizer(), tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    source = Counter(tuple([*(v + 1 for v in document), 0]) for document in values)
    train = Counter(map(tuple, documents(tmp_path / "parts" / "train")))
    held_out = Counter(map(tuple, documents(tmp_path / "parts" / "val"))) if fraction else Counter()
    assert train == Counter({document: 2 * n for document, n in (source - held_out).items()})


def test_large_text_is_encoded_in_pieces_into_the_same_ids(tmp_path, monkeypatch):
    vocabulary = tmp_path / "v.txt"
    create_vocab_file_from_tokens([*(bytes([b]) for b in range(256)), "ab", "abcde", "é", b"\xa9a", "\n\n"], vocabulary)
    text = "abcdéa\n\n\n😀abcdeabé" * 40
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(300))) + "\n")
    pieces = [text.encode()[start : start + 11] for start in range(0, len(text.encode()), 11)]
    for tokenizer in (BYTES, GenericTokenizer(vocabulary), WideTokenizer()):
        options = config(tmp_path / "a.txt", write_jsonl=True)
        prepare(options, tokenizer, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(encode, "LARGE_TEXT_BYTES", 100)
            patch.setattr(tokenize, "read_blocks", lambda source, digest: feed(pieces, digest))
            prepare(options, tokenizer, tmp_path / "pieces")
        assert content(tmp_path / "pieces") == content(tmp_path / "whole")
    monkeypatch.setattr(encode, "LARGE_TEXT_BYTES", 100)
    prepare(config(tmp_path / "numbers.txt"), IntegerTokenizer(), tmp_path / "numbers")
    assert documents(tmp_path / "numbers" / "train") == [[*range(1, 301), 0]]


def feed(pieces, digest):
    for piece in pieces:
        digest.update(piece)
        yield piece


def test_faults_in_large_text_name_the_byte_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LARGE_TEXT_BYTES", 10)
    create_vocab_file_from_tokens(["a", "abc"], tmp_path / "v.txt")
    (tmp_path / "a.txt").write_bytes(b"a" * 3_000_000 + b"?" + b"a" * 100)
    with pytest.raises(DataError, match=r"a\.txt: byte 3000000 of the file"):
        prepare(config(tmp_path / "a.txt"), GenericTokenizer(tmp_path / "v.txt"), tmp_path / "out")
    (tmp_path / "a.txt").write_bytes("é".encode() * 1_000_000 + b"\xc3")
    with pytest.raises(DataError, match="not UTF-8 text at byte 2000000"):
        prepare(config(tmp_path / "a.txt"), BYTES, tmp_path / "out")


# Validation split


def test_equal_documents_fall_on_one_side_and_the_share_is_close(tmp_path):
    values = [[n % 400 // 4] * (n % 3 + 1) for n in range(1000)]
    options = config(write_lines(tmp_path / "a.jsonl", values), validation_fraction=0.1, n_epochs_duplication=2)
    manifest = prepare(options, IntegerTokenizer(), tmp_path / "out")
    train = {tuple(document) for document in documents(tmp_path / "out" / "train")}
    held_out = [tuple(document) for document in documents(tmp_path / "out" / "val")]
    assert not train & set(held_out)
    assert abs(len(held_out) - 100) <= 10
    assert manifest.validation is not None
    assert manifest.validation.n_documents == len(held_out)
    assert manifest.n_documents == 2 * (1000 - len(held_out))


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999])
@pytest.mark.parametrize("seed", range(8))
def test_two_different_documents_give_one_to_each_side(tmp_path, fraction, seed):
    options = config(validation_fraction=fraction, seed=seed)
    prepare(options, IntegerTokenizer(), tmp_path, arrays=[np.array([[1], [2], [2]])])
    sides = [{tuple(d) for d in documents(tmp_path / name)} for name in ("train", "val")]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_a_split_of_equal_documents_is_refused(tmp_path):
    with pytest.raises(DataError, match="only one document"):
        prepare(config(validation_fraction=0.5), IntegerTokenizer(), tmp_path, arrays=[np.ones((3, 2), int)])


def test_the_split_depends_on_the_seed(tmp_path):
    array = np.arange(100).reshape(100, 1)
    held_out = []
    for seed in (0, 1):
        prepare(config(validation_fraction=0.2, seed=seed), IntegerTokenizer(), tmp_path / str(seed), arrays=[array])
        held_out.append(documents(tmp_path / str(seed) / "val"))
    assert len(held_out[0]) == len(held_out[1]) == 20
    assert sorted(held_out[0]) != sorted(held_out[1])


# Files


def test_jsonl_is_written_once_for_inputs_that_are_not_jsonl(tmp_path):
    options = config(write_jsonl=True, n_epochs_duplication=3, sequence_length=3)
    prepare(options, IntegerTokenizer(), tmp_path / "a", arrays=[np.array([0.0, 45, 90, 7])])
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == b'{"text": "0 45 90"}\n{"text": "7"}\n'
    (tmp_path / "t.txt").write_text('é"\n')
    prepare(config(tmp_path / "t.txt", write_jsonl=True), BYTES, tmp_path / "b")
    assert (tmp_path / "b" / "train.jsonl").read_bytes() == b'{"text": "\\u00e9\\"\\n"}\n'
    prepare(config(write_lines(tmp_path / "c.jsonl", ["x"]), write_jsonl=True), BYTES, tmp_path / "c")
    assert not (tmp_path / "c" / "train.jsonl").exists()


def test_manifest_lists_what_is_there(tmp_path):
    options = config(validation_fraction=0.5, write_jsonl=True)
    manifest = prepare(options, IntegerTokenizer(), tmp_path, arrays=[np.arange(20).reshape(10, 2)])
    assert set(content(tmp_path)) == {*manifest.files, "manifest.json"}
    assert set(manifest.files) == {"train.bin", "train.idx", "val.bin", "val.idx", "vocab.txt", "train.jsonl"}
    assert load_manifest(tmp_path, verify=True) == manifest
    assert manifest.token_prefix(tmp_path) == tmp_path / "train"
    assert manifest.validation_prefix(tmp_path) == tmp_path / "val"


def test_an_input_is_never_overwritten(tmp_path):
    path = tmp_path / "train.bin.txt"
    path.write_text("x")
    link = tmp_path / "train.jsonl"
    link.hardlink_to(path) if hasattr(link, "hardlink_to") else os.link(path, link)
    write_lines(tmp_path / "train.jsonl", ["abc"])
    prepare(config(tmp_path / "train.jsonl"), BYTES, tmp_path)  # beside its output: fine
    assert json.loads((tmp_path / "train.jsonl").read_text())["text"] == "abc"
    (tmp_path / "vocab.txt").write_text("my text")
    with pytest.raises(DataError, match="would be overwritten"):
        prepare(config(tmp_path / "vocab.txt"), BYTES, tmp_path)
    with pytest.raises(DataError, match="would be overwritten"):
        prepare(config(tmp_path / "train", tmp_path / "vocab.txt"), BYTES, tmp_path)


# Used again, or prepared anew and why


def test_unchanged_input_is_used_again_and_a_change_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, "rwkv_cluster")
    path, out = write_lines(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"

    def message(options, tokenizer=BYTES):
        caplog.clear()
        expected = reason_to_prepare(options, tokenizer, out)
        prepare(options, tokenizer, out)
        assert (expected is None) == ("is used again" in caplog.text)
        assert expected is None or expected in caplog.text
        return caplog.text

    assert "not been prepared yet" in message(config(path))
    inode = (out / "train.bin").stat().st_ino
    assert "is unchanged" in message(config(path))
    assert (out / "train.bin").stat().st_ino == inode
    assert "seed: 0 -> 1" in message(config(path, seed=1))
    assert "n_epochs_duplication: 1 -> 2" in message(config(path, seed=1, n_epochs_duplication=2))
    assert "tokenizer changed" in message(config(path, seed=1, n_epochs_duplication=2), WideTokenizer())
    base = config(path)
    message(base)
    write_lines(path, ["one", "tws"])
    assert "a.jsonl changed" in message(base)
    twice = message(config(path, path))
    assert "input has 2 files" in twice
    assert "it had 1" in twice
    message(base)
    (out / "train.bin").write_bytes(b"short")
    assert "train.bin has 5 bytes" in message(base)
    (out / "manifest.json").write_text("{")
    assert "is not JSON" in message(base)
    (out / "train.idx").unlink()
    assert "train.idx" in message(base)
    assert "is used again" in message(base)


def test_touching_or_moving_an_input_changes_nothing(tmp_path):
    path, out = write_lines(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"
    first = prepare(config(path), BYTES, out)
    os.utime(path, (1, 1))
    assert reason_to_prepare(config(path), BYTES, out) is None
    (out / "inputs.json").write_text("[nonsense")
    moved = path.rename(tmp_path / "b.jsonl")
    assert reason_to_prepare(config(moved), BYTES, out) is None
    assert prepare(config(moved), BYTES, out) == first


def test_an_unchanged_large_input_is_not_read_again(tmp_path, monkeypatch):
    path, out = write_lines(tmp_path / "a.jsonl", ["one"]), tmp_path / "out"
    monkeypatch.setattr(staleness, "_RECENT_NS", -(10**12))
    prepare(config(path), BYTES, out)
    monkeypatch.setattr(staleness, "content_digest", lambda source: pytest.fail("read again"))
    assert reason_to_prepare(config(path), BYTES, out) is None


def test_a_file_written_moments_ago_is_checked_by_content(tmp_path):
    path, out = write_lines(tmp_path / "a.jsonl", ["one"]), tmp_path / "out"
    prepare(config(path), BYTES, out)
    times = path.stat()
    write_lines(path, ["two"])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "changed" in str(reason_to_prepare(config(path), BYTES, out))


def test_changed_arrays_are_noticed(tmp_path):
    array = np.arange(10)
    prepare(config(), IntegerTokenizer(), tmp_path, arrays=[array])
    assert reason_to_prepare(config(), IntegerTokenizer(), tmp_path, arrays=[array.astype(np.int32)]) is None
    for other in (array[::-1], array.reshape(5, 2), array[:9]):
        assert reason_to_prepare(config(), IntegerTokenizer(), tmp_path, arrays=[other]) is not None


def test_files_of_an_earlier_preparation_do_not_stay(tmp_path):
    arrays = [np.arange(20).reshape(10, 2)]
    prepare(config(validation_fraction=0.5, write_jsonl=True), IntegerTokenizer(), tmp_path, arrays=arrays)
    prepare(config(), IntegerTokenizer(), tmp_path, arrays=arrays)
    assert set(content(tmp_path)) == {"train.bin", "train.idx", "vocab.txt", "manifest.json"}


def test_a_failed_preparation_leaves_the_earlier_one(tmp_path):
    manifest = prepare(config(), IntegerTokenizer(), tmp_path, arrays=[np.arange(10)])
    before = content(tmp_path)
    with pytest.raises(DataError):
        prepare(config(), IntegerTokenizer(), tmp_path, arrays=[np.array([-1])])
    assert content(tmp_path) == before
    assert load_manifest(tmp_path, verify=True) == manifest


def test_an_unwritable_directory_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be prepared in"):
        prepare(config(), IntegerTokenizer(), tmp_path / "file" / "out", arrays=[np.arange(10)])


# Token files of others


def foreign(prefix: Path, tokens, sizes, dtype=np.uint16) -> Path:
    with TokenFileWriter(prefix, dtype) as writer:
        writer.write(np.array(tokens, dtype), np.array(sizes))
    return prefix


def test_a_token_file_alone_is_used_where_it_is(tmp_path):
    prefix = foreign(tmp_path / "pile", [5, 6, 0, 7, 0], [3, 2])
    for entry in (prefix, f"{prefix}.bin"):
        manifest = prepare(config(entry, n_epochs_duplication=3), BYTES, tmp_path / "out")
        assert manifest.token_prefix(tmp_path / "out") == prefix
        assert (manifest.n_tokens, manifest.n_documents) == (5, 2)
        assert set(content(tmp_path / "out")) == {"vocab.txt", "manifest.json"}
    assert load_manifest(tmp_path / "out", verify=True) == prepare(
        DataConfig(inputs=[f"{prefix}.bin"]), BYTES, tmp_path / "out"
    )
    foreign(prefix, [5, 6, 0, 8, 0], [3, 2])
    with pytest.raises(DataError, match="sha256 differs"):
        load_manifest(tmp_path / "out", verify=True)
    assert "changed" in str(reason_to_prepare(config(prefix), BYTES, tmp_path / "out"))
    os.truncate(f"{prefix}.bin", 8)
    with pytest.raises(DataError, match="has 8 bytes"):
        load_manifest(tmp_path / "out")


def test_a_token_file_is_read_for_a_split_or_among_other_inputs(tmp_path):
    prefix = foreign(tmp_path / "pile", [5, 6, 0, 7, 0, 7], [3, 2, 1])
    manifest = prepare(config(prefix, validation_fraction=0.5), BYTES, tmp_path / "out")
    assert manifest.adopted is None
    sides = documents(tmp_path / "out" / "train"), documents(tmp_path / "out" / "val")
    assert sorted(sides) == [[[5, 6, 0]], [[7, 0], [7, 0]]]


@pytest.mark.parametrize("among_others", [False, True])
def test_tokens_outside_the_vocabulary_are_named(tmp_path, among_others):
    prefix = foreign(tmp_path / "pile", [5, 0, 6, 257, 0], [2, 3])
    inputs = [prefix, write_lines(tmp_path / "a.jsonl", ["x"])] if among_others else [prefix]
    with pytest.raises(DataError, match=r"pile\.bin: document 1, token 1: id 257 is not in .* 0 to 256"):
        prepare(config(*inputs), BYTES, tmp_path / "out")
    foreign(prefix, [5, -2, 0], [3], np.int32)
    with pytest.raises(DataError, match="document 0, token 1: id -2"):
        prepare(config(*inputs), BYTES, tmp_path / "out")


# The same bytes everywhere, and kills

SCRIPT = """
import sys
from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.preparation import prepare, tokenize
from rwkv_cluster.tokenizer import ByteTokenizer
tokenize._BYTES_WORTH_WORKERS, tokenize._TASK_BYTES = 0, 300
tokenize.line_blocks.__globals__["_BLOCK_BYTES"] = 200
source, out, workers = sys.argv[1:]
prepare.prepare(DataConfig(inputs=[source], validation_fraction=0.2, num_workers=int(workers)), ByteTokenizer(), out)
"""


def test_same_bytes_for_any_directory_locale_hash_seed_and_number_of_processes(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(20):
        (source / f"é{number}.txt").write_text(f"text {number} " * (number + 1))
        write_lines(source / f"{number}.jsonl", [f"line {number}.{line}" for line in range(10)])
    results = []
    for workers, cwd, environment in (
        (1, tmp_path, {"LC_ALL": "C", "PYTHONHASHSEED": "1"}),
        (3, source, {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2", "PYTHONUTF8": "1"}),
    ):
        entry, out = os.path.relpath(source, cwd), tmp_path / f"out{workers}"
        environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, entry, str(out), str(workers)]
        subprocess.run(command, cwd=cwd, env=environment, check=True)
        results.append(content(out))
    assert results[0] == results[1]
    assert len(results[0]) == 7


def test_errors_come_in_order_from_worker_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_BYTES_WORTH_WORKERS", 0)
    for number in range(8):
        write_lines(tmp_path / f"{number}.jsonl", ["fine", 5 if number in (3, 6) else "x"])
    with pytest.raises(DataError, match=r"3\.jsonl:2: "):
        prepare(config(tmp_path / "*.jsonl", num_workers=3), BYTES, tmp_path / "out")


class DyingTokenizer(ByteTokenizer):
    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_BYTES_WORTH_WORKERS", 0)
    monkeypatch.setattr(DyingTokenizer, "encode_to_array", DyingTokenizer.encode)
    path = write_lines(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(DataError, match="tokenizer process was killed"):
        prepare(config(path, num_workers=2), DyingTokenizer(), tmp_path / "out")


def prepare_and_die(out: Path, source: Path, call: int) -> None:
    """Runs in a forked process: SIGKILL before the call-th change to the file system that must be in order."""
    count = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("replace", "fsync", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    prepare(config(source, validation_fraction=0.2, shuffle=True, seed=1), BYTES, out)


@pytest.mark.system
@pytest.mark.parametrize("rows", ["text", "conversations"])
def test_killed_at_any_step_leaves_nothing_to_trust(tmp_path, rows):
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(30)])
    if rows == "conversations":
        write_rows(source, *({"prompt": f"question {number}", "completion": f"{number}"} for number in range(30)))
    old, new = config(source, write_jsonl=True), config(source, validation_fraction=0.2, shuffle=True, seed=1)
    prepare(new, BYTES, tmp_path / "undisturbed")
    finished = False
    for call in range(1, 80, 2):
        out = tmp_path / f"out{call}"
        before = prepare(old, BYTES, out)
        child = multiprocessing.get_context("fork").Process(target=prepare_and_die, args=(out, source, call))
        child.start()
        child.join()
        try:
            left = load_manifest(out, verify=True)
            assert left in (before, load_manifest(tmp_path / "undisturbed"))
        except MissingDataError:
            pass
        prepare(new, BYTES, out)
        left_behind = {".tmp-" in path.name for path in out.iterdir()}
        assert left_behind == {False}
        after = content(out)
        assert {name: after[name] for name in content(tmp_path / "undisturbed")} == content(tmp_path / "undisturbed")
        if child.exitcode == 0:
            finished = True
            break
        assert child.exitcode == -signal.SIGKILL
    assert finished
    assert call > 15


def test_many_processes_at_once_all_get_the_same_data(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(200)])
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=prepare, args=(config(source), BYTES, tmp_path / "out")) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert load_manifest(tmp_path / "out", verify=True).n_documents == 200


def test_write_pair_writes_only_the_pair(tmp_path):
    from rwkv_cluster.data.inputs.sources import source_at

    source = source_at(write_lines(tmp_path / "a.jsonl", ["x", "y"]))
    write_pair([source], encode.DocumentEncoder(BYTES), tmp_path / "sub" / "p", passes=2, seed=None)
    assert documents(tmp_path / "sub" / "p") == [encoded("x"), encoded("y")] * 2
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["p.bin", "p.idx"]
