import hashlib
import os
from pathlib import Path

import pytest

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.inputs.sources import content_digest, find_sources, source_at
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.workdir import WorkDir


def find(*inputs, **options):
    return find_sources(DataConfig(inputs=[str(entry) for entry in inputs], **options))


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (
        "b.txt",
        "a/z.txt",
        "a-b.txt",
        "a/.hidden",
        ".git/c.txt",
        "B.jsonl.gz",
        "p.bin",
        "p.idx",
        "a/v.npy.zst",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "in"


def test_a_folder_is_walked_in_an_order_without_locale(folder):
    found = [(str(source.path.relative_to(folder)), source.kind, source.compression) for source in find(folder)]
    assert found == [
        ("B.jsonl.gz", "jsonl", "gzip"),
        ("a/v.npy.zst", "array", "zstd"),
        ("a/z.txt", "text", ""),
        ("a-b.txt", "text", ""),
        ("b.txt", "text", ""),
        ("p", "tokens", ""),
    ]


def test_file_pattern_chooses_in_folders_only(folder):
    assert [source.path.name for source in find(folder, file_pattern="*.txt")] == ["z.txt", "a-b.txt", "b.txt"]
    assert [source.path.name for source in find(folder / "b.txt", file_pattern="*.py")] == ["b.txt"]
    with pytest.raises(DataError, match=r"no file that matches data.file_pattern '\*\.py'"):
        find(folder, file_pattern="*.py")


def test_globs_prefixes_and_literal_names_with_brackets(folder):
    assert [source.path.name for source in find(folder / "**" / "*.txt")] == ["a-b.txt", "z.txt", "b.txt"]
    for entry in ("p", "p.bin", "p.idx"):
        assert [(source.path.name, source.kind) for source in find(folder / entry)] == [("p", "tokens")]
    (folder / "[b].txt").write_text("x")
    assert [source.path.name for source in find(folder / "[b].txt")] == ["[b].txt"]


def test_entries_keep_their_order(folder):
    assert [source.path.name for source in find(folder / "b.txt", folder / "a-b.txt")] == ["b.txt", "a-b.txt"]


def test_what_leads_nowhere_is_named(folder, tmp_path):
    with pytest.raises(MissingDataError, match=r"no/such\.txt' does not exist"):
        find("no/such.txt")
    with pytest.raises(MissingDataError, match="does not exist"):
        find(folder / "*.none")
    with pytest.raises(MissingDataError, match="does not exist"):
        find(folder / "none" / "**" / "*.txt")
    (folder / "p.idx").unlink()
    with pytest.raises(MissingDataError, match=r"p\.idx does not exist"):
        find(folder / "p.bin")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty' has no file"):
        find(empty)
    with pytest.raises(DataError, match="not a path"):
        find("a\0b")
    with pytest.raises(DataError, match="compressed token file"):
        source_at_with_content(tmp_path / "t.bin.gz")


def source_at_with_content(path: Path):
    path.write_bytes(b"x")
    return source_at(path)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for entry in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="not a regular file"):
            find(entry)


def test_standard_library_without_tests_and_packages():
    sources = find("stdlib:")
    names = [str(source.path) for source in sources]
    assert len(names) > 100
    assert all(source.optional and source.path.suffix == ".py" for source in sources)
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    assert not any(left_out & set(Path(name).parts[-4:-1]) for name in names)
    with pytest.raises(DataError, match="'stdlib:json' is not known"):
        find("stdlib:json")


def test_content_digest_is_of_the_file_itself(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"not even gzip")
    assert content_digest(source_at(tmp_path / "a.gz")) == hashlib.sha256(b"not even gzip").hexdigest()


def names(folder: Path, sources) -> list[str]:
    return [str(source.path.relative_to(folder)) for source in sources]


def test_links_to_folders_are_followed_into_each_folder_once(folder, tmp_path):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "o.txt").write_text("o")
    for link, target in {
        "0-first": "a",  # a folder that is really there stays where it is
        "link-1": outside,
        "link-2": outside,
        "a/up": folder,  # around in a circle
        "link-3": outside / "deep",
        ".hidden-link": outside,
    }.items():
        (folder / link).symlink_to(target)
    found = ["B.jsonl.gz", "a/v.npy.zst", "a/z.txt", "a-b.txt", "b.txt", "link-1/deep/o.txt", "p"]
    assert names(folder, find(folder)) == found
    assert names(folder, find(folder / "a", file_pattern="z*")) == ["a/z.txt"]
    assert names(folder, find(folder / "**" / "*.txt")) == ["a-b.txt", "a/z.txt", "b.txt", "link-1/deep/o.txt"]


def test_a_link_is_read_as_the_folder_it_leads_to(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert [source.path.name for source in find(tmp_path / "link")] == [source.path.name for source in find(folder)]


def test_what_a_run_has_written_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "out/mine.txt", "w/texts/b.txt", "w/data/c.txt"):  # theirs, also beside what runs write
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    work = WorkDir("w")
    work.create()
    before = find(".")
    assert names(Path(), before) == ["a.txt", "out/mine.txt", "w/data/c.txt", "w/texts/b.txt"]
    prepare(DataConfig(inputs=["a.txt"]), ByteTokenizer(), work.data)
    for name in ("out/train_log.txt", "logs/metrics.jsonl", "configs/config.json", "report/index.html", "sweep/0/x.md"):
        path = work.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    left_out: list[Path] = []
    assert find_sources(DataConfig(inputs=["."]), left_out) == before
    assert Path("w/data/vocab.txt") in left_out
    assert Path("w/logs/metrics.jsonl") in left_out
    assert names(Path(), find("**/*.txt")) == names(Path(), before)
    assert names(Path(), find("w/data")) == ["w/data/c.txt"]
    assert names(Path(), find("w/data/train.jsonl")) == ["w/data/train.jsonl"]  # named by itself
    monkeypatch.chdir("w")
    assert names(Path(), find(".")) == ["data/c.txt", "texts/b.txt"]
