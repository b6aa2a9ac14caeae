"""Damaged token files are found: at the first start on a machine by every byte, later by sampled blocks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data import verify
from rwkv_cluster.data.manifest import DataManifest, load_manifest
from rwkv_cluster.data.preparation.prepare import Earlier, prepare
from rwkv_cluster.data.verify import DamagedFileError, check_every_byte, check_files
from rwkv_cluster.tokenizer import IntegerTokenizer

NAMES = ("train.bin", "train.idx", "val.bin", "val.idx", "vocab.txt", "train.jsonl")
OPTIONS = DataConfig(validation_fraction=0.3, write_jsonl=True)
ARRAYS = [np.arange(4000).reshape(100, 40) % 300]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "BLOCK_BYTES", 256)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare(OPTIONS, IntegerTokenizer(), tmp_path / "data", arrays=ARRAYS)
    return tmp_path / "data"


def flip(path: Path, *positions: int, keep_times: bool = False) -> None:
    """Flip a bit of the bytes at `positions`, in place. keep_times: without a trace, as a disk would."""
    status, content = path.stat(), bytearray(path.read_bytes())
    for position in positions:
        content[position] ^= 1
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def check(data: Path, names=NAMES) -> DataManifest:
    manifest = load_manifest(data)
    check_files(manifest, data, names)
    return manifest


def count_whole_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read, whole = [], verify._read_whole

    def counted(path: Path):
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(verify, "_read_whole", counted)
    return read


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("known", [False, True])
def test_a_flipped_bit_is_found_and_where(data, name, known):
    if known:
        check(data)
    flip(data / name, 300)
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged.*rwkv-cluster prepare CONFIG") as caught:
        check(data)
    assert ("in bytes 256 to 511" in str(caught.value)) == known
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged"):
        check_every_byte(load_manifest(data), data)


def test_every_byte_is_read_once_on_a_machine_and_after_any_change_of_the_file(data, monkeypatch):
    read = count_whole_reads(monkeypatch)
    check(data)
    assert sorted(read) == sorted(NAMES)
    check(data)
    assert len(read) == len(NAMES)
    os.utime(data / "train.bin")
    check(data)
    assert read[len(NAMES) :] == ["train.bin"]
    monkeypatch.setattr(verify, "machine", lambda: "another")
    check(data)
    assert len(read) == 2 * len(NAMES) + 1
    monkeypatch.undo()
    assert len(json.loads((data / "verified.json").read_bytes())["train.bin"]["machines"]) == 2


def test_a_flipped_bit_that_left_no_trace_is_found_by_the_sample(data, monkeypatch):
    check(data)
    monkeypatch.setattr(
        verify,
        "_stat",
        lambda path: json.loads((data / "verified.json").read_bytes())[path.name]["machines"][verify.machine()],
    )
    flip(data / "val.bin", 5)
    with pytest.raises(DamagedFileError, match=r"val\.bin is damaged.*in bytes 0 to 255"):
        check(data)


def test_only_so_many_blocks_are_read_of_a_file_that_is_known(data, monkeypatch):
    check(data)
    sizes = []
    monkeypatch.setattr(
        verify.zlib, "crc32", lambda block, crc32=verify.zlib.crc32: sizes.append(len(block)) or crc32(block)
    )
    monkeypatch.setattr(verify, "SAMPLED_BLOCKS", 3)
    check(data, ["train.bin"])
    assert len(sizes) == 3
    assert sum(sizes) <= 3 * 256 < (data / "train.bin").stat().st_size


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"train.bin": 3}', '{"train.bin": {"sha256": "", "blocks": 1, "machines": {}}}']
)
def test_without_a_usable_record_all_is_read(data, content, monkeypatch):
    (data / "verified.json").write_text(content)
    read = count_whole_reads(monkeypatch)
    check(data)
    assert sorted(read) == sorted(NAMES)


def test_a_record_that_lies_about_a_block_is_corrected_and_no_damage_is_told(data, monkeypatch):
    monkeypatch.setattr(verify, "SAMPLED_BLOCKS", 1000)
    check(data)
    record = json.loads((data / "verified.json").read_bytes())
    true = record["train.bin"]["blocks"][0]
    record["train.bin"]["blocks"][0] = true + 1
    (data / "verified.json").write_text(json.dumps(record))
    check(data)
    assert json.loads((data / "verified.json").read_bytes())["train.bin"]["blocks"][0] == true


@pytest.mark.parametrize("name", NAMES)
def test_preparing_makes_a_damaged_file_again_and_says_why(data, name, caplog):
    caplog.set_level("INFO", "rwkv_cluster")
    good = {other: (data / other).read_bytes() for other in NAMES}
    flip(data / name, 7)
    prepare(OPTIONS, IntegerTokenizer(), data, arrays=ARRAYS)
    assert f"{name} is damaged" in caplog.text
    assert "is used again" not in caplog.text
    assert {other: (data / other).read_bytes() for other in NAMES} == good
    prepare(OPTIONS, IntegerTokenizer(), data, arrays=ARRAYS)
    assert "is used again" in caplog.text


def test_a_run_is_told_of_a_damaged_file_and_nothing_is_made_anew(data):
    flip(data / "train.bin", 7)
    damaged = (data / "train.bin").read_bytes()
    with pytest.raises(DamagedFileError, match=r"train\.bin is damaged"):
        prepare(OPTIONS, IntegerTokenizer(), data, arrays=ARRAYS, earlier=Earlier(mend=False))
    assert (data / "train.bin").read_bytes() == damaged


def test_a_damaged_pair_of_somebody_else_is_not_taken_for_a_new_one(data, tmp_path, monkeypatch):
    """Its size and times are the old ones: a disk has changed it, and nobody wrote it."""
    prefix, out = data / "val", tmp_path / "out"
    prepare(DataConfig(inputs=[f"{prefix}.bin"]), IntegerTokenizer(), out)
    manifest = load_manifest(out)
    check_files(manifest, out, manifest.run_files)
    entry = json.loads((out / "verified.json").read_bytes())["train.bin"]
    flip(data / "val.bin", 300)
    monkeypatch.setattr(verify, "_stat", lambda path: entry["machines"][verify.machine()])
    monkeypatch.setattr("rwkv_cluster.data.preparation.prepare.why_stale", lambda *_, **__: None)
    with pytest.raises(DamagedFileError, match=r"val\.bin is damaged.*in bytes 256 to .*Put back a good copy"):
        prepare(DataConfig(inputs=[f"{prefix}.bin"]), IntegerTokenizer(), out)
