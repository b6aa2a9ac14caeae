"""Tokenizers of the Hub: the ids of the package `tokenizers` itself, id 0 for the end of a document, refused files."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_fixtures import write_hub_tokenizer

from rwkv_cluster.config import DataConfig, TokenizerConfig
from rwkv_cluster.data.preparation import tokenize
from rwkv_cluster.data.preparation.prepare import prepare, reason_to_prepare
from rwkv_cluster.data.run_tokenizer import tokenizer_of_run
from rwkv_cluster.tokenizer import (
    HubTokenizer,
    TokenizationError,
    VocabularyError,
    build_tokenizer,
    decode_for_display,
    describe_tokenizer,
    tokenizer_identity,
)

tokenizers = pytest.importorskip("tokenizers")
KINDS = ("bpe", "unigram", "wordpiece")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        write_hub_tokenizer(made / f"{kind}.json", kind)
    return made


def changed(source: Path, target: Path, **changes: Any) -> Path:
    target.write_text(json.dumps({**json.loads(source.read_text()), **changes}))
    return target


def texts(kind: str) -> list[str]:
    """Any text for the tokenizer of bytes, and what the others know."""
    source = Path(os.__file__).read_text()[:5000]
    draw = random.Random(4)
    soup = "".join(map(chr, draw.choices([*range(1, 0xD800), *range(0xE000, 0x30000)], k=2000)))
    return [source, "", " import  os\n", *([source.replace("\n", "\r\n"), soup, "a\0b"] if kind == "bpe" else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_the_package(kind: str, folder: Path, tmp_path: Path) -> None:
    file = folder / f"{kind}.json"
    theirs = tokenizers.Tokenizer.from_file(str(file))
    cutting = json.loads(_cutting(file).to_str())
    ours = HubTokenizer(changed(file, tmp_path / "tokenizer.json", **cutting))
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in texts(kind):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.encode_to_array(text).tolist() == ids
        assert ours.encode_to_array(text).dtype == np.uint16
        assert ours.decode([*ids, 0]) == theirs.decode(ids, skip_special_tokens=False)
        if kind == "bpe":
            assert decode_for_display(ours, ids) == text


def _cutting(file: Path) -> Any:
    """A tokenizer whose file also asks for cutting, padding and special tokens around each text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    token = tokenizer.id_to_token(1)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{token} $A", special_tokens=[(token, 1)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    assert len(tokenizer.encode("import os").ids) == 64
    return tokenizer


def test_text_that_would_be_id_0_is_an_error_with_its_byte(folder: Path) -> None:
    for kind, text, position, found in (
        ("bpe", "é<|endoftext|>a", 2, "<|endoftext|>"),
        ("wordpiece", "import \u2603", 7, "\u2603"),
        ("unigram", "import\u2603", 6, "\u2603"),
    ):
        with pytest.raises(TokenizationError, match=f"^byte {position}: .*{found!r}") as error:
            HubTokenizer(folder / f"{kind}.json").encode(text)
        assert error.value.byte_position == position
    with pytest.raises(TokenizationError, match=r"byte 1: .* half a surrogate pair"):
        HubTokenizer(folder / "bpe.json").encode("a\ud800")


def test_identity_is_that_of_what_the_file_says(folder: Path, tmp_path: Path) -> None:
    file = folder / "bpe.json"
    record = json.loads(file.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(record.items())), indent=1))
    ours = HubTokenizer(file)
    assert tokenizer_identity(HubTokenizer(tmp_path)) == tokenizer_identity(ours)
    assert tokenizer_identity(pickle.loads(pickle.dumps(ours))) == tokenizer_identity(ours)
    assert tokenizer_identity(HubTokenizer(folder / "unigram.json"))["sha256"] != tokenizer_identity(ours)["sha256"]
    config = TokenizerConfig(type="hf", path=str(file), added_tokens=["<|im_start|>"])
    assert describe_tokenizer(build_tokenizer(config)) == config
    assert tokenizer_identity(build_tokenizer(config))["added_tokens"] == ["<|im_start|>"]


def test_added_tokens_are_the_next_ids(folder: Path) -> None:
    plain = HubTokenizer(folder / "bpe.json")
    n = plain.vocab_size
    tokens = tokenizers.Tokenizer.from_file(str(folder / "bpe.json")).get_vocab()
    known = min(token for token in tokens if token.isascii() and token.isalpha() and len(token) > 2)
    ours = HubTokenizer(folder / "bpe.json", ["<|im_start|>", known, "<|im_start|>x"])
    assert ours.vocab_size == n + 2, "a token that the file has keeps its id"
    text = f"a<|im_start|>x<|im_start|>é {known}"
    assert ours.encode(text) == [*plain.encode("a"), n + 1, n, *plain.encode("é "), *ours.encode(known)]
    assert len(ours.encode(known)) == 1
    assert ours.decode(ours.encode(text)) == text
    assert tokenizers.Tokenizer.from_str(ours.exported().decode()).encode(text).ids == ours.encode(text)
    assert plain.exported() == (folder / "bpe.json").read_bytes()
    pieces = {n: plain.encode("<|im_start|>"), n + 1: plain.encode("<|im_start|>x")}
    assert ours.new_token_pieces() == pieces


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, 'no "model"'),
        ({"model": {"type": "RwkvTrie", "vocab": {}}}, "type 'RwkvTrie'"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "is damaged"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}, "largest id is 0, expected 1"),
        ({"added_tokens": []}, "id 0 is '<|endoftext|>'"),
    ],
)
def test_files_that_are_refused(changes: dict[str, Any], reason: str, folder: Path, tmp_path: Path) -> None:
    file = changed(folder / "bpe.json", tmp_path / "tokenizer.json", **changes)
    with pytest.raises(VocabularyError) as error:
        HubTokenizer(file)
    assert str(error.value).startswith(str(file))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_gaps_in_the_ids_are_not_filled_by_added_tokens(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 3, "c": 4}, "unk_token": "[UNK]"}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "model": model}))
    unknown = {"id": 0, "content": "[UNK]", "special": True, "normalized": False}
    unknown |= {name: False for name in ("single_word", "lstrip", "rstrip")}
    changed(file, file, added_tokens=[unknown])
    assert HubTokenizer(file).vocab_size == 5
    with pytest.raises(VocabularyError, match="its ids have gaps"):
        HubTokenizer(file, ["new"])


@pytest.mark.parametrize("added", [None, ["<|im_start|>", "river"]])
def test_prepared_data_does_not_depend_on_workers_and_keeps_the_file(
    added: list[str] | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("_BYTES_WORTH_WORKERS", 0), ("_TASK_BYTES", 300)):
        monkeypatch.setattr(tokenize, name, number)
    config = TokenizerConfig(type="hf", path=str(folder / "bpe.json"), added_tokens=added)
    tokenizer = build_tokenizer(config)
    lines = Path(os.__file__).read_text()[:20_000].split("\n\n")
    for number, text in enumerate(lines):
        (tmp_path / f"{number:03}.txt").write_text(f"{text} <|im_start|>")
    written = []
    for workers in (1, 2):
        data = DataConfig(inputs=[str(tmp_path / "*.txt")], num_workers=workers, validation_fraction=0.2)
        out = tmp_path / f"workers-{workers}"
        manifest = prepare(data, tokenizer, out)
        written.append({name: (out / name).read_bytes() for name in (*manifest.files, "manifest.json")})
    assert written[0] == written[1]
    assert written[0]["tokenizer.json"] == (folder / "bpe.json").read_bytes()
    assert "vocab.txt" not in written[0]

    gone = config.model_copy(update={"path": str(tmp_path / "gone.json")})
    again = tokenizer_of_run(gone, out)
    assert again.encode(lines[0]) == tokenizer.encode(lines[0])
    other = HubTokenizer(folder / "bpe.json", [*(added or []), "<|im_end|>"])
    assert "added_tokens: " in (reason_to_prepare(data, other, out) or "")
