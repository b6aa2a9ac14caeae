"""How fast data is prepared on one core, beside named rivals, in the same process and in alternating runs.

Cases: an integer array and integer JSONL to a token file, against the converters of the package `rwkv-trainer`; text to
World-vocabulary ids against `pyrwkv-tokenizer`. A rival that is not installed is left out. Medians over the repeats;
`ratio` is the median of the paired ratios. Our times include fsync and checksums, which the rivals do not do. The
array case is without the JSONL copy that `rwkv-trainer` always writes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.inputs.sources import find_sources
from rwkv_cluster.data.preparation.prepare import prepare
from rwkv_cluster.tokenizer import GenericTokenizer, IntegerTokenizer

_ROW = 1024
_MAX_VALUE = 359


def run(args: Sequence[str]) -> dict[str, Any]:
    """Measure with command-line arguments `args`. Result: {"cases": [{name, unit, ours, rival, ratio, ...}], ...}."""
    options = _parser().parse_args(args)
    with _one_core(), tempfile.TemporaryDirectory(dir=options.directory) as folder:
        rows = np.random.default_rng(0).integers(0, _MAX_VALUE + 1, (max(1, options.tokens // _ROW), _ROW))
        converters = _seed_converters(options.seed_package)
        cases = [
            _array_case(rows, Path(folder), converters, options.repeats),
            _jsonl_case(rows, Path(folder), converters, options.repeats),
        ]
        text_case = _text_case(options.megabytes, options.repeats)
    return {
        "cores": 1,
        "repeats": options.repeats,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "cases": cases + ([text_case] if text_case else []),
    }


def format(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{'one core, medians':34}{'rwkv_cluster':>16}{'rival':>12}{'ratio':>9}  rival's name"]
    for case in result["cases"]:
        rival = f"{case['rival']:.2f}" if case["rival"] else "-"
        ratio = f"{case['ratio']:.2f}x" if case["ratio"] else "-"
        lines.append(
            f"{case['name'] + ', ' + case['unit']:34}{case['ours']:>16.2f}{rival:>12}{ratio:>9}  {case['rival_name']}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rwkv-cluster bench data", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=8_000_000, help="integers in the array and in the JSONL file")
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text (standard library sources)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed-package", help="folder that holds rwkv_trainer, when it is not installed")
    parser.add_argument("--directory", help="where to write; default: the system's temporary folder")
    return parser


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _seed_converters(folder: str | None) -> Any:
    """`rwkv_trainer`'s converter module, or None. Found by its folder, so that the package's own imports (its trainer
    and its pinned Lightning) are not needed."""
    places = [Path(folder)] if folder else [Path(entry) for entry in sys.path]
    for place in places:
        for package in (place, place / "rwkv_trainer"):
            if (package / "data_utils" / "converter.py").is_file():
                sys.path.insert(0, str(package))
                try:
                    return importlib.import_module("data_utils.converter")
                finally:
                    sys.path.remove(str(package))
    return None


def _paired(ours: Callable[[], float], rival: Callable[[], float] | None, repeats: int) -> dict[str, Any]:
    """Seconds of both, one after the other, `repeats` times after one unmeasured turn of ours."""
    ours()
    pairs = [(ours(), rival() if rival else math.nan) for _ in range(repeats)]
    return {
        "ours_s": statistics.median(first for first, _ in pairs),
        "rival_s": statistics.median(second for _, second in pairs) if rival else None,
        "ratio": statistics.median(second / first for first, second in pairs) if rival else None,
    }


def _case(name: str, rival_name: str, unit: str, amount: float, times: dict[str, Any]) -> dict[str, Any]:
    rival = amount / times["rival_s"] if times["rival_s"] else None
    return {
        "name": name,
        "unit": unit,
        "ours": amount / times["ours_s"],
        "rival": rival,
        "rival_name": rival_name,
        **times,
    }


def _timed(work: Callable[[Path], Any], folder: Path) -> float:
    """Seconds of `work` in a fresh folder, without what it prints."""
    place = Path(tempfile.mkdtemp(dir=folder))
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        work(place)
        seconds = time.perf_counter() - start
    shutil.rmtree(place)
    return seconds


def _array_case(rows: np.ndarray, folder: Path, converters: Any, repeats: int) -> dict[str, Any]:
    config = DataConfig(write_jsonl=False, num_workers=1)
    tokenizer = IntegerTokenizer(_MAX_VALUE)

    def rival() -> float:
        return _timed(lambda place: converters.DataPipeline().process_numpy(rows, place, "train", _ROW, 3), folder)

    times = _paired(
        lambda: _timed(lambda place: prepare(config, tokenizer, place, arrays=[rows]), folder),
        rival if converters else None,
        repeats,
    )
    return _case("integer array, 3 passes", "rwkv-trainer", "M tokens/s", rows.size / 1e6, times)


def _jsonl_case(rows: np.ndarray, folder: Path, converters: Any, repeats: int) -> dict[str, Any]:
    path = folder / "integers.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in rows.tolist()))
    config = DataConfig(inputs=[str(path)], num_workers=1, n_epochs_duplication=1)
    tokenizer = IntegerTokenizer(_MAX_VALUE)

    def rival() -> float:
        return _timed(lambda place: converters.JsonlToBinIdxConverter().convert(path, place / "train", 1), folder)

    times = _paired(
        lambda: _timed(lambda place: prepare(config, tokenizer, place), folder),
        rival if converters else None,
        repeats,
    )
    return _case("integer JSONL, 1 pass", "rwkv-trainer", "M tokens/s", rows.size / 1e6, times)


def _text_case(megabytes: float, repeats: int) -> dict[str, Any] | None:
    try:
        rival = importlib.import_module("pyrwkv_tokenizer").RWKVTokenizer()
    except ImportError:
        return None
    tokenizer = GenericTokenizer(rival.vocab_filepath)
    texts, size = [], 0
    for source in find_sources(DataConfig(inputs=["stdlib:"])):
        content = source.path.read_bytes()
        texts.append(content.decode("utf-8", "ignore"))
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break

    def timed(encode: Callable[[str], Any]) -> float:
        start = time.perf_counter()
        for text in texts:
            encode(text)
        return time.perf_counter() - start

    times = _paired(lambda: timed(tokenizer.encode_to_array), lambda: timed(rival.encode), repeats)
    return _case("text, World vocabulary", "pyrwkv-tokenizer", "MB/s", size / 1e6, times)
