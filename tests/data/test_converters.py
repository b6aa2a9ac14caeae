import json

import numpy as np
import pytest

from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.data.converters import DataPipeline, JsonlToBinIdxConverter, NumpyToJsonlConverter
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.errors import ConfigError, DataError, MissingDataError
from rwkv_cluster.tokenizer import ByteTokenizer, IntegerTokenizer


def lines(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def items(prefix):
    tokens = open_tokens(prefix)
    return [tokens[item].tolist() for item in range(len(tokens))]


def test_array_to_jsonl(tmp_path):
    converter = NumpyToJsonlConverter()
    path = converter.convert(np.arange(5), tmp_path / "sub" / "a.jsonl", sequence_length=2)
    assert path.read_text() == '{"text": "0 1"}\n{"text": "2 3"}\n{"text": "4"}\n'
    assert lines(converter.convert(np.arange(5), tmp_path / "a.jsonl")) == ["0 1 2 3 4"]
    assert lines(converter.convert(np.array([[1.0, 2], [3, 4]]), tmp_path / "a.jsonl", 1)) == ["1 2", "3 4"]
    np.save(tmp_path / "a.npy", np.arange(5))
    assert lines(converter.convert_file(tmp_path / "a.npy", tmp_path / "a.jsonl", 3)) == ["0 1 2", "3 4"]


def test_transform_decides_the_text_of_a_value(tmp_path):
    path = NumpyToJsonlConverter(lambda value: f"<{value:.1f}>").convert(np.array([0.5, 1.25]), tmp_path / "a.jsonl")
    assert lines(path) == ["<0.5> <1.2>"]


def test_a_value_that_is_not_whole_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match=r"index 1: 1\.9 "):
        NumpyToJsonlConverter().convert(np.array([1, 1.9]), tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="sequence_length is 0"):
        NumpyToJsonlConverter().convert(np.arange(5), tmp_path / "a.jsonl", 0)
    with pytest.raises(MissingDataError, match=r"none\.npy"):
        NumpyToJsonlConverter().convert_file(tmp_path / "none.npy", tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_jsonl_to_token_file(tmp_path):
    path = tmp_path / "a.txt"  # any name: the converter reads JSONL
    path.write_text('{"text": "0 1 2"}\n\n{"text": "3"}\n')
    converter = JsonlToBinIdxConverter()
    assert isinstance(converter.tokenizer, IntegerTokenizer)
    prefix = converter.convert(path, tmp_path / "out" / "p", n_epochs=1, shuffle=False)
    assert prefix == tmp_path / "out" / "p"
    assert (tmp_path / "out" / "p.bin").read_bytes() == bytes.fromhex("0100 0200 0300 0000 0400 0000")
    assert converter.get_data_info(prefix) == {"num_items": 2, "total_tokens": 6, "dtype": "<class 'numpy.uint16'>"}
    converter.convert(path, tmp_path / "p", random_seed=1)
    assert sorted(items(tmp_path / "p")) == [[1, 2, 3, 0]] * 3 + [[4, 0]] * 3
    first = (tmp_path / "p.bin").read_bytes()
    converter.convert(path, tmp_path / "p", random_seed=1)
    assert (tmp_path / "p.bin").read_bytes() == first


def test_magic_prime_of_a_token_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 99}) + "\n")
    converter = JsonlToBinIdxConverter(ByteTokenizer())
    prefix = converter.convert(tmp_path / "a.jsonl", tmp_path / "p", n_epochs=1)
    assert converter.compute_magic_prime(prefix, 4) == 23  # 100 tokens, 24 slots that have a next token
    assert converter.compute_magic_prime(prefix, 34) is None


def test_a_failing_conversion_leaves_no_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"txt": "2"}\n')
    with pytest.raises(DataError, match=r'a\.jsonl:2: has no field "text"'):
        JsonlToBinIdxConverter().convert(tmp_path / "a.jsonl", tmp_path / "p")
    with pytest.raises(MissingDataError):
        JsonlToBinIdxConverter().convert(tmp_path / "none.jsonl", tmp_path / "p")
    with pytest.raises(ConfigError, match="n_epochs is 0"):
        JsonlToBinIdxConverter().convert(tmp_path / "a.jsonl", tmp_path / "p", n_epochs=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_pipeline_for_arrays(tmp_path):
    result = DataPipeline(IntegerTokenizer(999)).process(np.arange(250), tmp_path, "d", sequence_length=10, n_epochs=2)
    assert result == {
        "jsonl_path": tmp_path / "d.jsonl",
        "binidx_prefix": tmp_path / "d",
        "vocab_path": tmp_path / "vocab.txt",
        "num_sequences": 50,
        "total_tokens": 550,
        "magic_prime": 53,
    }
    assert all(result[name].is_file() for name in ("jsonl_path", "vocab_path"))
    assert len(lines(result["jsonl_path"])) == 25
    assert load_manifest(tmp_path, verify=True).name == "d"


def test_pipeline_for_jsonl_copies_it_also_onto_itself_and_after_an_array(tmp_path):
    pipeline = DataPipeline()
    pipeline.process_numpy(np.arange(20), tmp_path / "out", "d", 5, 1)
    source = tmp_path / "s.jsonl"
    source.write_text('{"text": "7 8"}\n')
    result = pipeline.process_jsonl(source, tmp_path / "out", "d", n_epochs=1)
    assert result["jsonl_path"].read_text() == source.read_text()
    assert items(result["binidx_prefix"]) == [[8, 9, 0]]
    again = pipeline.process_jsonl(result["jsonl_path"], tmp_path / "out", "d", n_epochs=2)
    assert again["num_sequences"] == 2
    assert again["jsonl_path"].read_text() == source.read_text()
    with pytest.raises(DataError, match="be a file name"):
        pipeline.process_jsonl(source, tmp_path / "out", "../d")
