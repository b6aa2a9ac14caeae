"""Packing: every document once and whole, windows that are full, and words for what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import IndexedTokens, TokenFileWriter, bin_path, idx_path, index_bytes, open_tokens
from rwkv_cluster.data.inputs.sources import find_sources
from rwkv_cluster.data.loss_mask import LossMaskWriter
from rwkv_cluster.data.manifest import DataManifest, load_manifest
from rwkv_cluster.data.preparation.pack import Packed, pack
from rwkv_cluster.data.preparation.prepare import prepare, prepared_before, reason_to_prepare
from rwkv_cluster.errors import DataError
from rwkv_cluster.tokenizer import ByteTokenizer

CTX_LEN = 16


def _tokens(folder: Path, lengths: list[int]) -> Path:
    """A file whose token at place i is i."""
    with TokenFileWriter(folder / "t", np.int32) as writer:
        writer.write(np.arange(sum(lengths), dtype=np.int32), np.array(lengths))
    return folder / "t"


def _mask(folder: Path, bits: np.ndarray) -> Path:
    with LossMaskWriter(folder / "t.mask") as writer:
        writer.write(bits)
    return folder / "t.mask"


def _packed(folder: Path, lengths: list[int], too_long: str = "split", mask: Path | None = None) -> Packed:
    return pack(_tokens(folder, lengths), folder / "w", DataConfig(too_long=too_long), CTX_LEN, mask)


def _windows(folder: Path) -> list[list[tuple[int, int]]]:
    windows: IndexedTokens = open_tokens(folder / "w")
    return [[tuple(pair) for pair in windows[number].reshape(-1, 2).tolist()] for number in range(len(windows))]


def _naive_best_fit(sizes: list[int]) -> list[int]:
    """How full each window is, by looking at all of them."""
    filled: list[int] = []
    for size in sizes:
        fitting = [room for room in filled if room + size <= CTX_LEN]
        if fitting:
            filled[filled.index(max(fitting))] += size
        else:
            filled.append(size)
    return filled


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_there_once_and_whole(tmp_path: Path, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 40, 300).tolist()
    record = _packed(tmp_path, lengths).record
    windows = _windows(tmp_path)
    assert all(sum(size for _, size in window) <= CTX_LEN for window in windows)
    spans = sorted(span for window in windows for span in window)
    expected = []
    for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        places = range(start, start + length - 1)
        expected += [(places[i], len(places[i : i + CTX_LEN])) for i in range(0, len(places), CTX_LEN)]
    assert spans == expected
    assert record.n_windows == len(windows)
    assert (record.n_spans, record.n_positions) == (len(spans), sum(lengths) - len(lengths))
    assert record.n_too_short == lengths.count(1)
    assert record.n_split == sum(length - 1 > CTX_LEN for length in lengths)
    assert record.waste == pytest.approx(1 - record.n_positions / (len(windows) * CTX_LEN))


def test_windows_are_as_full_as_the_best_fit_of_all_open_ones_makes_them(tmp_path: Path) -> None:
    lengths = np.random.default_rng(9).integers(2, CTX_LEN + 2, 400).tolist()
    _packed(tmp_path, lengths)
    found = sorted(sum(size for _, size in window) for window in _windows(tmp_path))
    assert found == sorted(_naive_best_fit([length - 1 for length in lengths]))


@pytest.mark.parametrize(
    ("too_long", "spans", "counts"),
    [
        ("split", [(0, 16), (16, 16), (32, 7), (40, 16)], {"n_split": 1}),
        ("drop", [(40, 16)], {"n_dropped": 1, "n_positions_lost": 39}),
        ("truncate_left", [(23, 16), (40, 16)], {"n_cut": 1, "n_positions_lost": 23}),
    ],
)
def test_a_document_longer_than_a_window(
    tmp_path: Path, too_long: str, spans: list[tuple[int, int]], counts: dict[str, int]
) -> None:
    record = _packed(tmp_path, [40, 17], too_long).record  # the second fits exactly
    assert sorted(span for window in _windows(tmp_path) for span in window) == spans
    told = {name: value for name, value in record.model_dump().items() if name in ("n_split", "n_cut", "n_dropped")}
    told["n_positions_lost"] = record.n_positions_lost
    assert {name: value for name, value in told.items() if value} == counts


def test_what_has_no_trained_target_takes_no_place(tmp_path: Path) -> None:
    lengths = [6, 1, 8, 40]
    bits = np.zeros(sum(lengths), bool)
    bits[0] = True  # a first token is never a target
    bits[[9, 12]] = True
    bits[15 + 33 :] = True
    record = _packed(tmp_path, lengths, mask=_mask(tmp_path, bits)).record
    assert sorted(span for window in _windows(tmp_path) for span in window) == [(7, 7), (15 + 32, 7)]
    assert (record.n_trained, record.n_untrained, record.n_too_short) == (2 + 7, 3, 1)
    assert record.n_windows == 1


def test_masks_are_counted_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 200).tolist()
    bits = np.random.default_rng(2).random(sum(lengths)) < 0.2
    monkeypatch.setattr("rwkv_cluster.data.preparation.pack._MASK_TOKENS", 50)
    monkeypatch.setattr("rwkv_cluster.data.preparation.pack._SPANS", 7)
    record = _packed(tmp_path, lengths, mask=_mask(tmp_path, bits)).record
    targets = [bits[start + 1 : start + length] for start, length in zip(np.cumsum(lengths) - lengths, lengths)]  # noqa: B905
    assert record.n_trained == sum(int(target.sum()) for target in targets)
    parts = [target[i : i + CTX_LEN] for target in targets for i in range(0, len(target), CTX_LEN)]
    assert record.n_untrained == sum(not part.any() for part in parts)
    assert sum(len(window) for window in _windows(tmp_path)) == record.n_spans == sum(part.any() for part in parts)


def test_a_document_of_several_items_is_one(tmp_path: Path) -> None:
    bin_path(tmp_path / "t").write_bytes(np.arange(10, dtype=np.uint16).tobytes())
    idx_path(tmp_path / "t").write_bytes(index_bytes([2, 3, 5], np.uint16, [0, 2, 3]))
    pack(tmp_path / "t", tmp_path / "w", DataConfig(), CTX_LEN, None)
    assert _windows(tmp_path) == [[(0, 4), (5, 4)]]


def _rows(path: Path, lengths: list[int]) -> Path:
    path.write_text("".join(json.dumps({"text": chr(97 + i % 26) * n}) + "\n" for i, n in enumerate(lengths)))
    return path


def _prepare(folder: Path, source: Path, *, ctx_len: int = CTX_LEN, **options: Any) -> DataManifest:
    data = DataConfig(inputs=[str(source)], **{"documents": "reset"} | options)
    return prepare(data, ByteTokenizer(), folder, ctx_len=ctx_len)


def test_a_preparation_packs_what_is_trained_on_and_what_is_held_out(tmp_path: Path) -> None:
    source = _rows(tmp_path / "a.jsonl", [3, 5, 20, 7, 9, 4, 12, 30])
    manifest = _prepare(tmp_path / "d", source, validation_fraction=0.25)
    assert manifest.n_documents == 6  # no copies
    assert load_manifest(tmp_path / "d", verify=True) == manifest
    names = {f"{prefix}.windows.{suffix}" for prefix in ("train", "val") for suffix in ("bin", "idx")}
    assert names <= set(manifest.files)
    assert set(manifest.validation_files) == {"val.bin", "val.idx", "val.windows.bin", "val.windows.idx"}
    assert manifest.packing is not None
    assert manifest.validation is not None
    assert manifest.packing.n_positions == manifest.n_tokens - 6
    assert manifest.validation.packing is not None
    assert manifest.validation.packing.n_positions == manifest.validation.n_tokens - 2
    assert _prepare(tmp_path / "d", source, validation_fraction=0.25) == manifest


def test_other_windows_are_prepared_anew(tmp_path: Path) -> None:
    source = _rows(tmp_path / "a.jsonl", [3, 5, 20, 7])
    before = _prepare(tmp_path / "d", source)
    data = DataConfig(inputs=[str(source)], documents="reset")

    def why(ctx_len: int = CTX_LEN, **changes: Any) -> str | None:
        return reason_to_prepare(data.model_copy(update=changes), ByteTokenizer(), tmp_path / "d", ctx_len=ctx_len)

    assert why() is None
    assert "ctx_len: 16 -> 32" in str(why(32))
    assert "too_long: split -> drop" in str(why(too_long="drop"))
    assert "documents: reset -> None" in str(why(documents="continue"))
    assert prepared_before(data, ByteTokenizer(), tmp_path / "d", ctx_len=CTX_LEN) == before
    assert prepared_before(data, ByteTokenizer(), tmp_path / "d", ctx_len=8) is None
    after = _prepare(tmp_path / "d", source, ctx_len=8)
    assert after.fingerprint != before.fingerprint
    stream = _prepare(tmp_path / "d", source, documents="continue", n_epochs_duplication=1)
    assert stream.packing is None
    assert not list((tmp_path / "d").glob("*.windows.*"))
    assert b"packing" not in stream.to_json()


def test_a_pair_stays_where_it_is_and_its_windows_are_here(tmp_path: Path) -> None:
    _prepare(tmp_path / "d", _rows(tmp_path / "a.jsonl", [3, 5, 20, 7]), documents="continue", n_epochs_duplication=1)
    pair = tmp_path / "d" / "train"
    manifest = _prepare(tmp_path / "e", pair)
    assert manifest.adopted == str(pair)
    assert manifest.packing is not None
    assert manifest.packing.n_positions == 3 + 5 + 20 + 7
    assert {path.name for path in (tmp_path / "e").glob("train.*")} == {"train.windows.bin", "train.windows.idx"}
    assert _prepare(tmp_path / "e", pair) == manifest

    (tmp_path / "e" / "b.txt").write_text("more")
    assert [source.path.name for source in find_sources(DataConfig(inputs=[str(tmp_path / "e")]))] == ["b.txt"]

    broken = tmp_path / "e" / "train.windows.bin"
    broken.write_bytes(bytes(len(broken.read_bytes())))
    assert _prepare(tmp_path / "e", pair) == manifest  # ours, and so made again
    assert load_manifest(tmp_path / "e", verify=True) == manifest

    flat = _prepare(tmp_path / "e", pair, documents="continue")
    assert flat.options == {"in_place": True}
    assert not list((tmp_path / "e").glob("train.*"))


def test_nothing_left_is_refused_in_a_sentence(tmp_path: Path) -> None:
    source = _rows(tmp_path / "a.jsonl", [20, 30])
    with pytest.raises(DataError, match=r"every document was left out .* 2 long documents left out") as refused:
        _prepare(tmp_path / "d", source, too_long="drop")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "d" / "manifest.json").exists()
