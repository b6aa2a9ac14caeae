import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.manifest import DataManifest, load_manifest, parse_manifest
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.errors import DataError, MissingDataError
from rwkv_cluster.tokenizer import IntegerTokenizer


@pytest.fixture
def prepared(tmp_path) -> Path:
    data = DataConfig(write_jsonl=False, validation_fraction=0.3)
    prepare(data, IntegerTokenizer(), tmp_path / "data", arrays=[np.arange(20).reshape(10, 2)])
    return tmp_path / "data"


def record(prepared: Path) -> dict:
    return json.loads((prepared / "manifest.json").read_bytes())


def change(prepared: Path, **fields) -> None:
    (prepared / "manifest.json").write_text(json.dumps(record(prepared) | fields))


def test_round_trip(prepared):
    manifest = load_manifest(prepared, verify=True)
    assert parse_manifest(manifest.to_json(), prepared) == manifest


def test_fingerprint_follows_tokens_and_vocabulary_only(prepared):
    manifest = load_manifest(prepared)
    other = manifest.model_copy(update={"source_digest": "0" * 64, "options": {}})
    assert manifest.fingerprint == other.fingerprint
    assert manifest.fingerprint != manifest.model_copy(update={"vocab_size": 999}).fingerprint
    files = manifest.files | {"train.bin": manifest.files["val.bin"]}
    assert manifest.fingerprint != manifest.model_copy(update={"files": files}).fingerprint


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 2}, "manifest version 2, expected 1"),
        ({"version": True}, "manifest version True"),
        ({"prefix": "../train"}, "prefix"),
        ({"prefix": "/etc/passwd"}, "prefix"),
        ({"prefix": "."}, "prefix"),
        ({"prefix": "other"}, r"files lacks other\.bin, other\.idx"),
        ({"name": "a/b"}, "name"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "files"),
        ({"files": {}}, "files lacks"),
        ({"adopted": "relative/path"}, "adopted is not"),
        ({"adopted": "/data/../etc/x"}, "adopted is not"),
        ({"adopted": "/dev/zero"}, "zero.bin"),
        ({"n_tokens": -1}, "n_tokens"),
        ({"n_tokens": "9"}, "n_tokens"),
        ({"n_tokens": 2**64}, "n_tokens"),
        ({"dtype": "object"}, "dtype"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(prepared, fields, reason):
    change(prepared, **fields)
    with pytest.raises(DataError, match=reason):
        load_manifest(prepared)


def test_links_out_of_the_directory_are_refused(prepared, tmp_path):
    outside = (prepared / "train.bin").rename(tmp_path / "outside")
    (prepared / "train.bin").symlink_to(outside)
    with pytest.raises(DataError, match="not a regular file"):
        load_manifest(prepared)


def test_missing_changed_and_special_files_are_named(prepared, tmp_path):
    with pytest.raises(MissingDataError, match="not prepared"):
        load_manifest(tmp_path)
    content = bytearray((prepared / "val.bin").read_bytes())
    content[0] ^= 1
    (prepared / "val.bin").write_bytes(content)
    load_manifest(prepared)
    with pytest.raises(DataError, match=r"val\.bin is not the file that was prepared"):
        load_manifest(prepared, verify=True)
    (prepared / "val.bin").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"val\.bin has \d+ bytes"):
        load_manifest(prepared)
    (prepared / "val.bin").unlink()
    with pytest.raises(MissingDataError, match=r"val\.bin"):
        load_manifest(prepared)
    (prepared / "manifest.json").unlink()
    (prepared / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(prepared)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"version": 1}', b"1" * 9999]
)
def test_what_is_no_manifest(prepared, content):
    (prepared / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(prepared)


def test_a_sparse_giant_is_not_read(prepared):
    os.truncate(prepared / "manifest.json", 1 << 40)
    with pytest.raises(DataError, match="cannot be a manifest"):
        load_manifest(prepared)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_manifest_loads_or_is_a_data_error(prepared, data):
    fields = record(prepared)
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("../../etc/passwd")
    )
    junk = st.recursive(
        junk, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2)
    )
    for _ in range(data.draw(st.integers(0, 3))):
        fields[data.draw(st.sampled_from([*fields, "other"]))] = data.draw(junk)
    content = json.dumps(fields).encode()
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    try:
        manifest = parse_manifest(content[:cut], prepared / "manifest.json")
    except DataError:
        return
    assert isinstance(manifest, DataManifest)
    if manifest.adopted is None:
        assert manifest.token_prefix(prepared).parent == prepared
    for name in manifest.files:
        assert "/" not in name
