"""Rows of tokens with labels or a mask, on their way into token files and masks beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared_files import content, marked_documents, plain_config, write_rows

from rwkv_cluster.data.manifest import DataManifest, load_manifest
from rwkv_cluster.data.preparation import shuffle_split, token_store, tokenize
from rwkv_cluster.data.preparation.prepare import prepare, reason_to_prepare
from rwkv_cluster.errors import DataError
from rwkv_cluster.tokenizer import ByteTokenizer, IntegerTokenizer

BYTES = ByteTokenizer()
LABELLED = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}


def test_labels_and_masks_lie_beside_the_tokens(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        LABELLED,
        {"tokens": [9, 0], "mask": [1, 0]},
        {"text": "ab"},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, -100], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [], "labels": []},
    )
    manifest = prepare(plain_config(path, format="tokens", skip_bad_lines=True), BYTES, tmp_path / "out")
    assert marked_documents(tmp_path / "out") == [
        ([5, 6, 7, 8, 0], [0, 0, 1, 1, 1]),
        ([9, 0], [1, 0]),
        ([1, 2, 3, 0], [0, 1, 0, 0]),
    ]
    assert (manifest.n_tokens, manifest.n_trained, manifest.n_bad_lines, manifest.n_empty_documents) == (11, 5, 1, 1)
    assert manifest.options["rows"] == "tokens"
    assert load_manifest(tmp_path / "out", verify=True) == manifest
    assert manifest.files["train.mask"].bytes == 2


def test_integers_are_values_and_their_zero_is_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"tokens": [0, 3, 0], "mask": [0, 1, 0]})
    prepare(plain_config(path), IntegerTokenizer(9), tmp_path / "out")
    assert marked_documents(tmp_path / "out") == [([1, 4, 1, 0], [0, 1, 0, 0])]


def test_text_is_all_trained_on_and_the_first_row_says_what_rows_are(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    write_rows(folder / "b.jsonl", {"text": "two", **LABELLED})  # the field of text counts first
    write_rows(folder / "c.jsonl", LABELLED)
    arrays = [np.array([[7, 8]])]
    manifest = prepare(plain_config(folder), BYTES, tmp_path / "out", arrays=arrays)
    text = [([*BYTES.encode(word), 0], [1] * 4) for word in ("one", "two")]
    assert marked_documents(tmp_path / "out") == [([7, 8, 0], [1] * 3), *text, ([5, 6, 7, 8, 0], [0, 0, 1, 1, 1])]
    assert manifest.options["rows"] == "text+tokens"
    assert reason_to_prepare(plain_config(folder), BYTES, tmp_path / "out", arrays=arrays) is None


def test_another_mask_is_other_data(tmp_path: Path) -> None:
    def prepared(mask: list[int]) -> DataManifest:
        path = write_rows(tmp_path / "a.jsonl", {"tokens": [5, 6, 7], "mask": mask})
        return prepare(plain_config(path), BYTES, tmp_path / "out")

    manifests = [prepared(mask) for mask in ([0, 0, 1], [0, 1, 0], [1, 1, 1])]
    assert len({manifest.files["train.bin"].sha256 for manifest in manifests}) == 1
    assert len({manifest.fingerprint for manifest in manifests}) == 3
    assert "train.mask" not in content(tmp_path / "out")  # the last one's has gone


def many(path: Path, n: int) -> Path:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(n):
        ids = generator.integers(1, 250, int(generator.integers(2, 40))).tolist()
        mask = generator.integers(0, 2, len(ids) - 1).tolist()
        rows.append({"tokens": ids, "mask": [*mask, 1]})
    return write_rows(path, *rows, *rows[: n // 3])


def test_a_document_keeps_its_mask_through_shuffle_split_and_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(tmp_path / "a.jsonl", 300)
    options = {"shuffle": True, "validation_fraction": 0.2, "n_epochs_duplication": 2}
    manifest = prepare(plain_config(path, **options), BYTES, tmp_path / "one")
    monkeypatch.setattr(tokenize, "_BYTES_WORTH_WORKERS", 1)
    monkeypatch.setattr(shuffle_split, "REGION_BYTES", 4096)
    for name, size in (("LARGE_DOCUMENT_BYTES", 100), ("_BLOCK_BYTES", 100), ("_HELD_BYTES", 0)):
        monkeypatch.setattr(token_store, name, size)
    prepare(plain_config(path, num_workers=2, **options), BYTES, tmp_path / "other")
    assert content(tmp_path / "one") == content(tmp_path / "other")
    wanted = {(*row["tokens"], 0): [*row["mask"], 1] for row in map(json.loads, path.read_text().splitlines())}
    train, held_out = marked_documents(tmp_path / "one"), marked_documents(tmp_path / "one", "val")
    assert all(wanted[tuple(ids)] == mask for ids, mask in train + held_out)
    assert not {tuple(ids) for ids, _ in train} & {tuple(ids) for ids, _ in held_out}
    assert manifest.n_trained == sum(sum(mask) for _, mask in train)
    assert manifest.validation is not None
    assert manifest.validation.n_trained == sum(sum(mask) for _, mask in held_out)


def test_the_split_of_text_is_that_of_the_same_ids_with_labels(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    plain = write_rows(tmp_path / "p.jsonl", *({"text": text} for text in texts))
    ids = [BYTES.encode(text) for text in texts]
    labelled = write_rows(tmp_path / "l.jsonl", *({"tokens": row, "mask": [0, *[1] * (len(row) - 1)]} for row in ids))
    for path, name in ((plain, "plain"), (labelled, "labelled")):
        prepare(plain_config(path, validation_fraction=0.3), BYTES, tmp_path / name)
    for file in ("train.bin", "train.idx", "val.bin", "val.idx"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "labelled" / file).read_bytes()


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [5, 6], "labels": [-100]},
        {"input_ids": [5, 6], "labels": [6, -100]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
        {"input_ids": [5, 6], "labels": [-100, 6.0]},
        {"input_ids": "ab", "labels": [-100, 6]},
        {"tokens": [5, 6], "mask": [0, 2]},
        {"tokens": [5, 6], "mask": [0, 0]},
        {"tokens": [5, 6]},
        {"text": "ab"},
    ],
)
def test_a_bad_row_is_refused_with_its_place_or_counted(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "a.jsonl", LABELLED, row)
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        prepare(plain_config(path, format="tokens"), BYTES, tmp_path / "out")
    assert prepare(plain_config(path, format="tokens", skip_bad_lines=True), BYTES, tmp_path / "out").n_bad_lines == 1


def test_rows_of_one_kind_are_not_looked_for_in_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(DataError, match=r"a\.txt is no JSONL"):
        prepare(plain_config(tmp_path / "a.txt", format="tokens"), BYTES, tmp_path / "out")


def test_text_keeps_its_manifest_and_a_changed_format_prepares_anew(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": [5, 6], **LABELLED})
    manifest = prepare(plain_config(path), BYTES, tmp_path / "out")
    assert "rows" not in manifest.options
    assert reason_to_prepare(plain_config(path, format="text"), BYTES, tmp_path / "out") is None
    assert reason_to_prepare(plain_config(path, format="tokens"), BYTES, tmp_path / "out") is not None


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.5}])
def test_the_mask_of_a_token_file_is_not_lost(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "a.jsonl", LABELLED, {"tokens": [9], "mask": [1]})
    prepare(plain_config(path), BYTES, tmp_path / "one")
    pair = plain_config(tmp_path / "one" / "train", **options)
    with pytest.raises(DataError, match=r"train\.mask"):
        prepare(pair, BYTES, tmp_path / "other")
    (tmp_path / "one" / "train.mask").unlink()
    assert prepare(pair, BYTES, tmp_path / "other").n_trained is None


@pytest.mark.parametrize("vocab_size", [257, 100_000], ids=["narrow", "wide"])
def test_rows_that_are_all_trained_on_are_plain_data(tmp_path: Path, vocab_size: int) -> None:
    """Of both widths of ids: one stream, with the copies that were asked for, and no mask."""
    tokenizer = IntegerTokenizer(vocab_size - 2)
    path = write_rows(tmp_path / "a.jsonl", {"tokens": [4, 2], "mask": [1, 1]}, {"tokens": [6], "mask": [1]})
    data = plain_config(path, n_epochs_duplication=3, validation_fraction=0.5)
    manifest = prepare(data, tokenizer, tmp_path / "out")
    assert manifest.validation is not None
    assert (manifest.n_trained, manifest.packing, manifest.validation.n_trained) == (None, None, None)
    assert (manifest.n_documents, manifest.validation.n_documents) == (3, 1)
    assert {name for name in content(tmp_path / "out") if "mask" in name} == set()
    assert b"n_trained" not in manifest.to_json()
    found = sorted({tuple(ids) for name in ("train", "val") for ids, _ in marked_documents(tmp_path / "out", name)})
    assert found == [(5, 3, 0), (7, 0)]
    assert reason_to_prepare(data, tokenizer, tmp_path / "out") is None
