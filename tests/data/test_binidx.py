import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_cluster.data.binidx import TokenFileWriter, index_bytes, open_tokens
from rwkv_cluster.data.mmap_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from rwkv_cluster.errors import DataError, MissingDataError

DOCUMENTS = [[5, 6, 7, 0], [300, 0], [9, 9, 9, 9, 0]]


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.write(np.array(document, dtype), np.array([len(document)]))
    return prefix


def damage(prefix: Path, offset: int, content: bytes) -> None:
    with open(f"{prefix}.idx", "r+b") as handle:
        handle.seek(offset)
        handle.write(content)


def test_index_bytes_are_those_of_the_format():
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 4, 2, 5) + struct.pack("<3q", 0, 8, 12) + struct.pack("<4q", 0, 1, 2, 3)
    assert len(expected) == 102
    assert index_bytes([4, 2, 5], np.uint16) == expected


def test_writer_gives_exactly_the_format(tmp_path):
    prefix = write(tmp_path / "a.b")  # a prefix may have a dot
    assert Path(f"{prefix}.idx").read_bytes() == index_bytes([4, 2, 5], np.uint16)
    assert (
        Path(f"{prefix}.bin").read_bytes()
        == np.array([token for document in DOCUMENTS for token in document], "<u2").tobytes()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_writer_that_fails_leaves_nothing_and_keeps_the_old_pair(tmp_path):
    write(tmp_path / "train")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="do not add up"), TokenFileWriter(tmp_path / "train", np.uint16) as writer:
        writer.write(np.zeros(10, np.uint16), np.array([9]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16"])
def test_open_reads_what_was_written(tmp_path, dtype):
    documents = [[1, 2, 0], [0], [100, 0]]
    tokens = open_tokens(write(tmp_path / "t", documents, dtype))
    assert tokens.dtype == dtype
    assert [tokens[item].tolist() for item in range(len(tokens))] == documents
    assert tokens.tokens.tolist() == [token for document in documents for token in document]
    assert tokens.doc_idx.tolist() == [0, 1, 2, 3]
    assert pickle.loads(pickle.dumps(tokens)).read(1, 4).tolist() == [2, 0, 0]


def test_no_items_is_a_valid_file(tmp_path):
    tokens = open_tokens(write(tmp_path / "t", []))
    assert (len(tokens), tokens.n_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"X", "MMIDIDX header"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x00", "dtype code 0"),
        (17, b"\x09", "dtype code 9"),
        (17, b"\x06", "floating-point"),
        (18, struct.pack("<Q", 2**64 - 1), "items"),
        (18, struct.pack("<Q", 2**61), "items"),
        (26, struct.pack("<Q", 2**61), "document marks"),
        (34, struct.pack("<i", -4), "item 0 has size -4"),
        (38, struct.pack("<i", 3), "item 2 points to byte 12, expected 14"),
        (46, struct.pack("<q", 2), "item 0 points to byte 2, expected 0"),
        (62, struct.pack("<q", 2**62), "item 2 points to byte"),
        (42, struct.pack("<i", 6), "has 22 bytes, but t.idx describes 24"),
        (70, struct.pack("<q", 1), "doc_idx must rise"),
        (86, struct.pack("<q", 4), "doc_idx must rise"),
        (94, struct.pack("<q", 2), "doc_idx ends at 2, .* 3"),
    ],
)
def test_a_damaged_index_is_named_with_its_fault(tmp_path, offset, content, reason):
    prefix = write(tmp_path / "t")
    damage(prefix, offset, content)
    with pytest.raises(DataError, match=reason):
        open_tokens(prefix)


def test_truncated_and_mismatched_files_are_refused(tmp_path):
    prefix = write(tmp_path / "t", [[7] * 3000 + [0]] * 4)
    for suffix in ("bin", "idx"):
        path = Path(f"{prefix}.{suffix}")
        whole = path.read_bytes()
        for size in {0, 1, 17, 33, 34, len(whole) - 1, *range(4096, len(whole), 4096)}:
            path.write_bytes(whole[:size])
            with pytest.raises(DataError):
                open_tokens(prefix)
        path.write_bytes(whole + b"\0")
        with pytest.raises(DataError):
            open_tokens(prefix)
        path.write_bytes(whole)
    other = write(tmp_path / "other", [[1, 2, 0]])
    Path(f"{other}.bin").replace(f"{prefix}.bin")
    with pytest.raises(DataError, match="do not belong together"):
        open_tokens(prefix)


def test_missing_or_special_files_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match=r"t\.bin"):
        open_tokens(tmp_path / "t")
    prefix = write(tmp_path / "t")
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(MissingDataError, match=r"t\.idx"):
        open_tokens(prefix)
    Path(f"{prefix}.idx").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        open_tokens(prefix)


def test_a_huge_count_allocates_nothing(tmp_path):
    prefix = write(tmp_path / "t")
    damage(prefix, 18, struct.pack("<QQ", 2**40, 2**40))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            open_tokens(prefix)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_while_open_is_an_error_and_not_a_crash(tmp_path):
    prefix = write(tmp_path / "t", [[1] * 10_000])
    tokens = open_tokens(prefix)
    with open(f"{prefix}.bin", "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(DataError, match="shorter"):
        tokens[0]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_open_or_are_a_data_error(tmp_path, data):
    prefix = write(tmp_path / "t")
    for suffix in ("bin", "idx"):
        content = bytearray(Path(f"{prefix}.{suffix}").read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        Path(f"{prefix}.{suffix}").write_bytes(bytes(content[:cut]) + data.draw(st.binary(max_size=4)))
    try:
        tokens = open_tokens(prefix)
    except DataError:
        return
    assert sum(len(tokens[item]) for item in range(len(tokens))) == tokens.n_tokens


def test_dataset_offers_items_slices_and_parts(tmp_path):
    dataset = MMapIndexedDataset(str(write(tmp_path / "t")))
    assert len(dataset) == 3
    assert dataset[0].tolist() == [5, 6, 7, 0]
    assert dataset[np.int64(1)].tolist() == [300, 0]
    assert dataset[-1].tolist() == [9, 9, 9, 9, 0]
    assert [item.tolist() for item in dataset[1:3]] == DOCUMENTS[1:]
    assert dataset.get(2, offset=1, length=2).tolist() == [9, 9]
    assert dataset.get(2, offset=3).tolist() == [9, 0]
    assert dataset.sizes.tolist() == [4, 2, 5]
    assert dataset.get_doc_idx().tolist() == [0, 1, 2, 3]
    assert pickle.loads(pickle.dumps(dataset))[0].tolist() == [5, 6, 7, 0]
    assert MMapIndexedDataset.exists(str(tmp_path / "t"))
    assert not MMapIndexedDataset.exists(str(tmp_path / "u"))
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(IndexError):
        dataset.get(0, offset=2, length=3)


@pytest.mark.parametrize("opened", [open_tokens, MMapIndexedDataset])
def test_a_token_file_can_be_closed_and_pickled(tmp_path, monkeypatch, opened):
    write(tmp_path / "t")
    monkeypatch.chdir(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    with opened("t") as tokens:
        item, pickled = tokens[0].tolist(), pickle.dumps(tokens)
    tokens.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert item == [5, 6, 7, 0]
    with pytest.raises(ValueError, match=r"t\.bin is closed"):
        tokens[0]
    monkeypatch.chdir("/")
    assert pickle.loads(pickled)[1].tolist() == [300, 0]


def test_a_replaced_doc_idx_is_pickled_too(tmp_path):
    dataset = MMapIndexedDataset(write(tmp_path / "t"))
    dataset.set_doc_idx(np.array([0, 3]))
    assert pickle.loads(pickle.dumps(dataset)).doc_idx.tolist() == [0, 3]


def test_an_index_of_megatrons_multimodal_builder_is_named(tmp_path):
    index = Path(f"{write(tmp_path / 't')}.idx")
    index.write_bytes(index.read_bytes() + bytes([0, 1, 0]))
    with pytest.raises(DataError, match=r"t\.idx is an index of Megatron's multimodal builder: .* each of its 3 items"):
        open_tokens(tmp_path / "t")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated or damaged"):
        open_tokens(tmp_path / "t")


def test_builder_groups_items_into_documents(tmp_path):
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "t.bin"))
    for item in ([1, 2], [3], [4, 0]):
        builder.add_item(np.array(item, np.uint16))
        if item != [1, 2]:
            builder.end_document()
    assert not (tmp_path / "t.bin").exists()  # only a finished pair takes the name
    builder.finalize(str(tmp_path / "t.idx"))
    dataset = MMapIndexedDataset(tmp_path / "t")
    assert dataset.doc_idx.tolist() == [0, 2, 3]
    assert [item.tolist() for item in dataset[:]] == [[1, 2], [3], [4, 0]]


def test_builder_refuses_another_dtype(tmp_path):
    builder = MMapIndexedDatasetBuilder(tmp_path / "t.bin")
    with pytest.raises(DataError, match="dtype int64, expected uint16"):
        builder.add_item(np.array([70_000]))
