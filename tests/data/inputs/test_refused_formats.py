import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.errors import DataError
from rwkv_cluster.tokenizer import ByteTokenizer

TEXT = b"hello world, some text. " * 40
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>"
HEADER = json.dumps({"a": {"dtype": "F32"}}).encode()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return file.getvalue()


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, TEXT)
    return file.getvalue()


def saved(save, *arguments, **options) -> bytes:
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


def database(path: Path) -> bytes:
    with sqlite3.connect(path) as connection:
        connection.execute("create table t(a)")
    return path.read_bytes()


def prepared(path: Path) -> str:
    """The text that training would see."""
    out = path.parent / "out"
    prepare(DataConfig(inputs=[str(path)], n_epochs_duplication=1, write_jsonl=False), ByteTokenizer(), out)
    return ByteTokenizer().decode(open_tokens(out / "train").tokens)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.tar", tar(), r"a tar archive, not plain text\. Unpack it \(tar xf .*a\.tar\)"),
        ("a.tar.gz", gzip.compress(tar(), mtime=0), "a tar archive"),
        ("a.tar.zst", zstandard.compress(tar()), "a tar archive"),
        ("a.tar.xz", lzma.compress(tar()), "a tar archive"),
        ("a.tgz", gzip.compress(tar(), mtime=0), "a tar archive"),
        ("a.gz", gzip.compress(tar(), mtime=0), "a tar archive"),
        ("a.txt", tar(), "a tar archive"),
        ("a.zip", zipped("a.txt"), "a zip archive"),
        ("a.txt", zipped("a.txt"), "a zip archive"),
        ("a.docx", zipped("[Content_Types].xml"), "an office document"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
        ("a.rar", b"Rar!\x1a\x07\1\0", "a rar archive"),
        ("a.bz2", bz2.compress(TEXT), "compressed with bzip2"),
        ("a.txt", lzma.compress(TEXT), "compressed with xz"),
        ("a.txt", gzip.compress(TEXT, mtime=0), "compressed with gzip"),
        ("a.jsonl", zstandard.compress(TEXT), "compressed with zstd, not JSONL"),
        ("a.jsonl.zst", gzip.compress(TEXT, mtime=0), "compressed with gzip"),
        ("a.csv", b"id,text\n1,a\n", "a table of comma-separated values"),
        ("a.TSV.gz", gzip.compress(b"id\ttext\n", mtime=0), "a table of tab-separated values"),
        ("a.parquet", b"PAR1\x15\4", "a Parquet table"),
        ("a.txt", b"ARROW1\0\0", "a Feather table"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\1\0\0", "an Arrow table"),
        ("a.npz", saved(np.savez, np.arange(3)), r"an \.npz archive"),
        ("a.txt", saved(np.save, np.arange(3)), "a NumPy array"),
        ("a.pkl", pickle.dumps([1], 0), "a Python pickle"),
        ("a.txt", pickle.dumps([1]), "a Python pickle"),
        ("a.pt", saved(lambda file, value: torch.save(value, file), torch.ones(2)), r"a file of torch\.save"),
        ("a.txt", struct.pack("<Q", len(HEADER)) + HEADER, "a safetensors file"),
        ("a.gguf", b"GGUF\3\0\0\0", "a GGUF model"),
        ("a.pdf", b"%PDF-1.7\n", "a PDF"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "an image"),
        ("a.txt", b"\xff\xd8\xff\xe0JFIF", "an image"),
        ("a.mp3", b"ID3\4", "audio"),
        ("a.mp4", b"\0\0\0 ftypisom", "video"),
        ("a.txt", b"\x7fELF\2\1\1", "a compiled program"),
        ("a.ipynb", b'{"cells": []}', "a Jupyter notebook"),
        ("a.txt", "text".encode("utf-16"), r"UTF-16 text, .* \| iconv -f UTF-16 -t UTF-8"),
        ("a.txt", TEXT.decode().encode("utf-16-le"), "UTF-16LE text"),
        ("a.jsonl", TEXT.decode().encode("utf-16-be"), "UTF-16BE text"),
        ("a.txt", "text".encode("utf-32"), "UTF-32 text"),
        ("a.txt", bytes(1000), "a file of zero"),
        ("a.txt", POINTER, r"a git-lfs pointer .*\(git lfs pull\)"),
        ("a.jsonl", POINTER, "a git-lfs pointer"),
        ("a.jsonl.gz", POINTER, "a git-lfs pointer"),
        ("a.npy", POINTER, "a git-lfs pointer"),
        ("a.npy.zst", POINTER, "a git-lfs pointer"),
        ("a.csv", POINTER, "a git-lfs pointer"),
        ("a.jsonl", PAGE, "an HTML page"),
        ("a.npy", PAGE, "an HTML page"),
    ],
)  # fmt: skip
def test_another_format_is_refused_by_its_name(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is {found}"):
        prepared(tmp_path / name)


def test_a_database_is_refused_by_its_name(tmp_path):
    database(tmp_path / "a.db")
    with pytest.raises(DataError, match=r"a\.db is an SQLite database"):
        prepared(tmp_path / "a.db")


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_a_pointer_to_a_token_file_is_refused_by_its_name(tmp_path, part):
    prepare(DataConfig(), ByteTokenizer(), tmp_path / "out", arrays=[np.arange(1, 9)])
    (tmp_path / f"out/train.{part}").write_bytes(POINTER)
    with pytest.raises(DataError, match=rf"train\.{part} is a git-lfs pointer"):
        open_tokens(tmp_path / "out/train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", '{"text": "a"}'),
        ("a.txt", "id,text\n1,a\n"),
        ("a.html", PAGE.decode()),
        ("a.md", "# A title"),
        ("a.pt", "um texto"),
        ("a.so", "qoraal"),
        ("README", "PAR1 and GGUF and BZh9 and MZ and GIF8"),
        ("a.txt", "GGUF is a format"),
        ("a.txt", "PAR1"),
        ("a.txt", "BZh9 stands for bzip2"),
        ("a.txt", "ID3 tags"),
        ("a.txt", "RIFF"),
        ("a.txt", "a\0b"),
    ],
)
def test_text_that_only_resembles_a_format_is_text(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert prepared(tmp_path / name).rstrip("\0") == content


def test_a_stray_file_of_a_folder_is_named_before_the_others_are_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"not UTF-8: \xff")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"b\.png is an image.*data\.file_pattern"):
        prepared(folder)


@pytest.mark.parametrize("content", [[{"text": "abc"}, {"text": "def"}], ["abc", "def"]])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a b.json", "a b.json.gz"])
def test_a_json_array_is_refused_with_a_command_that_converts_it(tmp_path, content, indent, name):
    data = json.dumps(content, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=r"JSON array.*Convert the file: ") as error:
        prepared(tmp_path / name)
    subprocess.run(str(error.value).partition("Convert the file: ")[2], shell=True, check=True)
    assert sorted(prepared(tmp_path / "a b-lines.jsonl")) == sorted("abcdef")


def test_a_table_is_refused_with_a_command_that_converts_it(tmp_path):
    (tmp_path / "it's.csv").write_text('id,text\n1,"a, b"\n')
    with pytest.raises(DataError, match=r"Convert it \(") as error:
        prepared(tmp_path / "it's.csv")
    command = str(error.value).partition("Convert it (")[2].partition(") and name")[0]
    subprocess.run(command, shell=True, check=True)
    assert prepared(tmp_path / "it's.jsonl") == "a, b"


def test_json_lines_are_read_whatever_the_suffix(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "abc"}\n')
    assert prepared(tmp_path / "a.json") == "abc"
    (tmp_path / "a.json").write_text('{\n "text": "abc"\n}\n')
    with pytest.raises(DataError, match=r"a\.json:1: .*several lines"):
        prepared(tmp_path / "a.json")


class OfWords:
    """A tokenizer with ids that a byte cannot hold."""

    vocab_size = 301

    def encode(self, src: str) -> list[int]:
        return [300 for _ in src.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join("word" for _ in tokens)


def test_bytes_of_an_array_are_the_bytes_of_a_text(tmp_path):
    array = np.frombuffer(b"hello \xff\0", np.uint8)
    config = DataConfig(n_epochs_duplication=1)
    prepare(config, ByteTokenizer(), tmp_path, arrays=[array])
    assert ByteTokenizer().decodeBytes(open_tokens(tmp_path / "train").tokens) == array.tobytes()
    with pytest.raises(DataError, match=r"array 1 .*\(uint8\).* 300"):
        prepare(config, OfWords(), tmp_path, arrays=[array])
    prepare(config, ByteTokenizer(), tmp_path, arrays=[array.astype(np.uint16) + 1])  # ids, as any other dtype
    assert ByteTokenizer().decodeBytes(open_tokens(tmp_path / "train").tokens) == array.tobytes()
