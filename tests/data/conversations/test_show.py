"""The document that prepare shows: marked, short, and harmless to a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from prepared_files import plain_config, write_rows

from rwkv_cluster.cli import main
from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import dump_yaml
from rwkv_cluster.data.conversations.show import BRACKETS, GREEN, MOST_TOKENS, first_document, marked_text
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
ROW = {"prompt": "q \x1b[31m", "completion": "a\x07\u202e"}


def test_text_is_marked_and_harmless() -> None:
    ids = np.array([*BYTES.encode("ab\x1b[2Jc"), 0])
    trained = np.array([0, 1, 1, 1, 1, 1, 0, 1], bool)
    assert marked_text(ids, trained, BYTES, BRACKETS) == "a[[b\\x1b[2J]]c[[<end>]]"
    assert marked_text(ids[:1], trained[:1], BYTES, GREEN) == "a"
    assert marked_text(ids[1:2], trained[1:2], BYTES, GREEN) == "\x1b[32mb\x1b[0m"


def test_a_long_document_is_cut(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a" * MOST_TOKENS})
    prepare(plain_config(path), BYTES, tmp_path / "out")
    text = first_document(tmp_path / "out" / "train", BYTES, BRACKETS)
    assert text == "User: q\n\nAssistant:[[ " + "a" * (MOST_TOKENS - 20) + "]] ... and 21 tokens more"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_prepare_shows_what_is_trained_on(
    tmp_path: Path, on_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROW, {"prompt": "q"})
    config = Config(work_dir=str(tmp_path / "work"), data=plain_config(path, skip_bad_lines=True))
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    assert main(["prepare", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "1 lines were left out" in shown
    marked = "\x1b[32m{}\x1b[0m" if on_terminal else "[[{}]]"
    answer = marked.format(" a\\x07\\u202e<end>")
    assert shown.endswith(f"User: q \\x1b[31m\n\nAssistant:{answer}\n")
