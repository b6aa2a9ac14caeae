"""What the tests of tokenizers share: the C library built from today's sources, the World vocabulary."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from rwkv_cluster.tokenizer import integer, trie_matcher


def compile_library(target: Path) -> None:
    """Compile trie_matcher.c with every warning an error; skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = Path(trie_matcher.__file__).with_name("trie_matcher.c")
    subprocess.run([compiler, *flags, "-o", str(target), str(source)], check=True)


@functools.cache
def compiled_library() -> ctypes.CDLL:
    """The library of trie_matcher.c; it stays loaded when its file is gone."""
    with tempfile.TemporaryDirectory() as folder:
        compile_library(Path(folder) / "greedy.so")
        library = trie_matcher.load_library(Path(folder) / "greedy.so")
    assert library is not None, "trie_matcher.c and trie_matcher.py disagree about VERSION"
    return library


@pytest.fixture(params=["native", "python"])
def implementation(request, monkeypatch):
    """Runs a test once with the C library and once as on a machine without a compiler."""
    library = compiled_library() if request.param == "native" else None
    for module in (trie_matcher, integer):
        monkeypatch.setattr(module, "library", lambda: library)
    return request.param


def world_file() -> Path:
    spec = importlib.util.find_spec("rwkv")
    if spec is None or spec.origin is None:
        pytest.skip("the rwkv package is not installed")
    return Path(spec.origin).with_name("rwkv_vocab_v20230424.txt")


def write_hub_tokenizer(path: Path, kind: str = "bpe") -> Path:
    """A tokenizer.json of a few hundred ids whose id 0 is a special token, in the form of GPT-NeoX, T5 or BERT."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    text = Path(os.__file__).read_text()[:20_000].splitlines(keepends=True)
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, **options)
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        options = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
        trainer = trainers.UnigramTrainer(vocab_size=400, show_progress=False, **options)
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["[UNK]", "[CLS]"])
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(path))
    return path
