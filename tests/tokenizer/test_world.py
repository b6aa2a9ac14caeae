"""The World vocabulary: found without its package being imported, known by what it says, in either line ending."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path

import pytest
import tokenizer_fixtures

from rwkv_cluster.config import TOKENIZER_TYPES, TokenizerConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer import (
    ByteTokenizer,
    GenericTokenizer,
    VocabularyError,
    build_tokenizer,
    describe_tokenizer,
    has_world_vocabulary,
    tokenizer_identity,
    world_file,
    world_vocabulary,
)
from rwkv_cluster.tokenizer.table import BUILT_IN


@pytest.fixture(scope="module")
def lf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "lf.txt"
    path.write_bytes(tokenizer_fixtures.world_file().read_bytes().replace(b"\r\n", b"\n"))
    return path


@pytest.fixture(scope="module")
def world() -> GenericTokenizer:
    tokenizer_fixtures.world_file()
    return build_tokenizer(TokenizerConfig(type="world"))


def texts() -> list[str]:
    """Python with CRLF, every plane of Unicode, control characters, and runs longer than any token."""
    draw = random.Random(3)
    numbers = [*range(0xD800), *range(0xE000, 0x110000)]
    planes = "".join(map(chr, draw.choices(numbers, k=20_000)))
    source = Path(os.__file__).read_text()
    controls = "".join(map(chr, range(0x300))) * 3
    return [source.replace("\n", "\r\n"), planes, controls, " " * 5000 + "\n" * 5000 + "0" * 5000, "", "a\0\r\n\t b"]


def test_both_line_endings_are_one_vocabulary(world: GenericTokenizer, lf_file: Path) -> None:
    assert Path(world.vocab_file).read_bytes().count(b"\r\n") == 65_529, "the rwkv package's copy ends in CRLF"
    lf = build_tokenizer(TokenizerConfig(type="world", vocab_file=str(lf_file)))
    assert tokenizer_identity(lf) == tokenizer_identity(world)
    assert lf.vocab_size == world.vocab_size == 65_536
    assert all(lf.encode(text) == world.encode(text) for text in texts())


@pytest.mark.system
def test_ids_equal_those_of_the_rwkv_package(world: GenericTokenizer) -> None:
    published = pytest.importorskip("rwkv.rwkv_tokenizer").TRIE_TOKENIZER(str(world.vocab_file))
    for text in texts():
        ids = world.encode(text)
        assert ids == published.encode(text)
        assert world.decodeBytes(ids) == text.encode()
    assert world.encode("\n\n") == [261]


def test_the_file_is_written_byte_for_byte(world: GenericTokenizer, lf_file: Path) -> None:
    content = world_vocabulary(world)
    assert content == lf_file.read_bytes()
    assert len(content) == 1_093_733
    assert hashlib.sha256(content).hexdigest().startswith("e6dee3d4")
    assert world_vocabulary(GenericTokenizer(lf_file)) == content, "a run with type generic has it too"


def test_another_vocabulary_is_not_taken_for_it(lf_file: Path, tmp_path: Path) -> None:
    lines = lf_file.read_bytes().splitlines(keepends=True)
    for name, content in (("fewer", lines[:-1]), ("few", lines[:9])):
        (tmp_path / name).write_bytes(b"".join(content))
        with pytest.raises(VocabularyError, match=r"are not those of rwkv_vocab_v20230424.txt. Use type generic"):
            build_tokenizer(TokenizerConfig(type="world", vocab_file=str(tmp_path / name)))
    assert not has_world_vocabulary(GenericTokenizer(tmp_path / "few"))
    with pytest.raises(ConfigError, match="the tokenizer is ByteTokenizer with 257 ids, whose vocabulary is not that"):
        world_vocabulary(ByteTokenizer())


def test_the_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rwkv", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rwkv").mkdir()
    (tmp_path / "rwkv/__init__.py").write_text("raise SystemExit('imported')")
    assert world_file() is None
    with pytest.raises(ConfigError, match=r"no installed package has rwkv_vocab_v20230424.txt. `pip install"):
        build_tokenizer(TokenizerConfig(type="world"))
    (tmp_path / "rwkv/rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n")
    assert world_file() == tmp_path / "rwkv/rwkv_vocab_v20230424.txt"


def test_it_is_described_as_it_was_made(world: GenericTokenizer, lf_file: Path) -> None:
    assert describe_tokenizer(world) == TokenizerConfig(type="world")
    for name in ("world", "generic"):
        config = TokenizerConfig(type=name, vocab_file=str(lf_file))
        assert describe_tokenizer(build_tokenizer(config)) == config


def test_each_type_of_the_configuration_has_a_class() -> None:
    assert BUILT_IN.keys() == TOKENIZER_TYPES.keys()
