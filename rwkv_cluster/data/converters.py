"""Array -> JSONL -> token file by hand: names and meanings of the package `rwkv-trainer`, over `preparation.prepare`.

Where they differ from it: the rest of a 1-D array is kept as a shorter sequence, a value that is not whole is refused
(not cut), the shuffle is reproducible (seed 0 unless given), and a failure leaves no half-written file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.data.inputs.readers import Values, array_values, as_array, npy_values
from rwkv_cluster.data.inputs.sources import read_blocks, source_at
from rwkv_cluster.data.manifest import DataManifest, check_name
from rwkv_cluster.data.preparation.encode import DocumentEncoder, text_line, values_line
from rwkv_cluster.data.preparation.prepare import prepare, write_pair
from rwkv_cluster.data.sampler import largest_magic_prime
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.tokenizer import IntegerTokenizer, as_tokenizer
from rwkv_cluster.workdir import HUB_TOKENIZER, VOCABULARY, atomic_writer


class NumpyToJsonlConverter:
    """Arrays to JSONL, one sequence a line: `{"text": "0 45 90"}`.

    transform: gives the text of a value; default: its decimal digits, and DataError for a value that is not whole.
    """

    def __init__(self, transform: Callable[[Any], str] | None = None) -> None:
        self.transform = transform

    def convert(self, data: np.ndarray, output_path: str | Path, sequence_length: int | None = None) -> Path:
        """Write `data`: rows of a 2-D array, or a 1-D array cut into `sequence_length` (None: one sequence)."""
        data = as_array(data, "the array")
        length = max(1, data.size) if sequence_length is None else sequence_length
        return self._write(Path(output_path), array_values(data, "the array", _positive(length, "sequence_length")))

    def convert_file(self, input_path: str | Path, output_path: str | Path, sequence_length: int = 1024) -> Path:
        """The same for a `.npy` file."""
        path = source_at(Path(input_path)).path
        rows = npy_values(path, str(path), _positive(sequence_length, "sequence_length"))
        return self._write(Path(output_path), rows)

    def _write(self, path: Path, blocks: Iterable[Values]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as handle:
            for values in blocks:
                handle.writelines(self._lines(values))
        return path

    def _lines(self, values: Values) -> Iterator[bytes]:
        if self.transform is None:
            values.check_whole()
            yield from map(values_line, values.rows)
        else:
            for row in values.rows:
                yield text_line(" ".join(map(self.transform, row)))


class JsonlToBinIdxConverter:
    """JSONL to `.bin`/`.idx`. tokenizer: default IntegerTokenizer(359)."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = IntegerTokenizer(max_value=359) if tokenizer is None else as_tokenizer(tokenizer)

    def convert(
        self,
        jsonl_path: str | Path,
        output_prefix: str | Path,
        n_epochs: int = 3,
        shuffle: bool = True,
        random_seed: int | None = None,
    ) -> Path:
        """Write every document `n_epochs` times, each pass shuffled anew; random_seed None is 0. Returns the prefix."""
        prefix = Path(output_prefix)
        source = replace(source_at(Path(jsonl_path)), kind="jsonl")
        seed = (random_seed or 0) if shuffle else None
        encoder = DocumentEncoder(self.tokenizer)
        write_pair([source], encoder, prefix, passes=_positive(n_epochs, "n_epochs"), seed=seed)
        return prefix

    def get_data_info(self, prefix: str | Path) -> dict[str, Any]:
        """num_items, total_tokens and dtype of a token file."""
        tokens = open_tokens(prefix)
        return {"num_items": len(tokens), "total_tokens": tokens.n_tokens, "dtype": str(tokens.dtype.type)}

    def compute_magic_prime(self, data_prefix: str | Path, ctx_len: int) -> int | None:
        """`data.sampler.largest_magic_prime` of a token file: None when it is too small for `ctx_len`."""
        return largest_magic_prime(open_tokens(data_prefix).n_tokens, _positive(ctx_len, "ctx_len"))


class DataPipeline:
    """Array or JSONL to a prepared directory in one call. tokenizer: default IntegerTokenizer(359).

    Results have jsonl_path, binidx_prefix, vocab_path, num_sequences (with duplication), total_tokens, magic_prime.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = IntegerTokenizer(max_value=359) if tokenizer is None else as_tokenizer(tokenizer)
        self.numpy_converter = NumpyToJsonlConverter()
        self.jsonl_converter = JsonlToBinIdxConverter(self.tokenizer)

    def process(
        self,
        data: np.ndarray,
        output_dir: str | Path,
        name: str = "data",
        sequence_length: int = 1024,
        n_epochs: int = 3,
    ) -> dict[str, Any]:
        """Convert arrays to JSONL and token files, as `process_numpy` does."""
        return self.process_numpy(data, output_dir, name, sequence_length, n_epochs)

    def process_numpy(
        self,
        data: np.ndarray,
        output_dir: str | Path,
        name: str = "data",
        sequence_length: int = 1024,
        n_epochs: int = 3,
    ) -> dict[str, Any]:
        """Prepare an array; the magic prime is for a ctx_len of `sequence_length`."""
        config = _data_config(sequence_length, n_epochs)
        manifest = prepare(config, self.tokenizer, output_dir, arrays=[data], name=name)
        return _result(manifest, Path(output_dir), sequence_length)

    def process_jsonl(
        self,
        jsonl_path: str | Path,
        output_dir: str | Path,
        name: str = "data",
        n_epochs: int = 3,
        sequence_length: int = 1024,
    ) -> dict[str, Any]:
        """Copy a JSONL file to `<output_dir>/<name>.jsonl` and prepare it; the magic prime is for `sequence_length`."""
        config = _data_config(sequence_length, n_epochs)
        copy = Path(output_dir) / f"{check_name(name)}.jsonl"
        source = replace(source_at(Path(jsonl_path)), kind="jsonl")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not (copy.exists() and os.path.samefile(source.path, copy)):
            with atomic_writer(copy) as handle:
                handle.writelines(read_blocks(source))
        config = config.model_copy(update={"inputs": [str(copy)]})
        return _result(prepare(config, self.tokenizer, output_dir, name=name), Path(output_dir), sequence_length)


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"{name} is {value}, expected at least 1")
    return value


def _data_config(sequence_length: int, n_epochs: int) -> DataConfig:
    return DataConfig(
        sequence_length=_positive(sequence_length, "sequence_length"),
        n_epochs_duplication=_positive(n_epochs, "n_epochs"),
    )


def _result(manifest: DataManifest, out_dir: Path, ctx_len: int) -> dict[str, Any]:
    return {
        "jsonl_path": out_dir / f"{manifest.name}.jsonl",
        "binidx_prefix": out_dir / manifest.name,
        "vocab_path": out_dir / (HUB_TOKENIZER if HUB_TOKENIZER in manifest.files else VOCABULARY),
        "num_sequences": manifest.n_documents,
        "total_tokens": manifest.n_tokens,
        "magic_prime": largest_magic_prime(manifest.n_tokens, ctx_len),
    }
