"""Which files of an input folder are no input because this package wrote them: a run must not read what it leaves.

In a work directory these are the folders `out`, `logs`, `configs`, `report`, `launch` and `sweep`; in a prepared
directory the files that its manifest lists. Everything else in them stays input. A file that is named by itself is
never left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from rwkv_cluster.data.manifest import CACHE_NAME, is_windows, parse_manifest
from rwkv_cluster.data.verify import CACHE_NAME as VERIFIED
from rwkv_cluster.errors import DataError
from rwkv_cluster.workdir import DATA_MANIFEST, HUB_TOKENIZER, VOCABULARY

_OF_A_RUN = {"out", "logs", "configs", "report", "launch", "sweep"}
_SIGNS = ("data", "logs", "configs", "out/checkpoints")  # folders that every work directory has


def without(files: Iterable[Path], folder: Path, left_out: list[Path]) -> list[Path]:
    """`files`, found in `folder`, without those of this package, which are appended to `left_out`."""
    top = max(len(folder.parts) - 1, 0)  # `folder` may itself be a part of a work directory

    @cache
    def of_a_run(parent: Path) -> bool:
        levels = range(top, len(parent.parts))
        return any(parent.parts[n] in _OF_A_RUN and _is_work_dir(Path(*parent.parts[:n])) for n in levels)

    prepared = cache(_prepared)
    inputs: list[Path] = []
    for file in files:
        is_own = of_a_run(file.parent) or file.name in prepared(file.parent)
        (left_out if is_own else inputs).append(file)
    return inputs


def _is_work_dir(folder: Path) -> bool:
    return all((folder / sign).is_dir() for sign in _SIGNS)


def _prepared(folder: Path) -> set[str]:
    """Names of the files of a prepared directory; empty for any other."""
    path = folder / DATA_MANIFEST
    try:
        manifest = parse_manifest(path.read_bytes(), path)
    except (OSError, DataError):
        return set()
    names = set(manifest.files)
    if manifest.options.get("in_place"):
        names = {name for name in names if name in (VOCABULARY, HUB_TOKENIZER) or is_windows(name)}
    return {DATA_MANIFEST, CACHE_NAME, VERIFIED} | names
