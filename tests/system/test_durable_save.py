"""Row B8, by strace: everything that a save has written is on the disk before its name is, and then the name."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from system.processes import Job, Watched
from tiny_run import tiny_run_config, write_config

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("strace") is None and not os.environ.get("CI"), reason="strace is not installed"),
]

CALLS = "fsync,fdatasync,rename,renameat,renameat2"
SYNC = re.compile(r"f(?:data)?sync\(\d+<(.+?)>")
RENAME = re.compile(r'rename(?:at2?)?\((?:AT_FDCWD(?:<.*?>)?, )?"(.+?)", (?:AT_FDCWD(?:<.*?>)?, )?"(.+?)"')


@pytest.mark.parametrize("background", [False, True])
def test_synced_before_the_rename_and_the_folder_after(
    background: bool, tmp_path: Path, start: Callable[..., Job]
) -> None:
    config = tiny_run_config(
        tmp_path, training={"max_steps": 4}, checkpoint={"save_interval_steps": 4, "background": background}
    )
    write_config(tmp_path / "run.yaml", config)
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-y", "--seccomp-bpf", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(trace)]
    start(tmp_path, prefix=strace).complete()
    work = Watched(tmp_path).work
    lines = trace.read_text().splitlines()
    renamed = {to: (number, source) for number, line in enumerate(lines) for source, to in RENAME.findall(line)}
    for target in (work.checkpoints / "step-00000004", work.final_weights, work.data / "manifest.json"):
        number, source = renamed[str(target)]
        before = {path for line in lines[:number] for path in SYNC.findall(line)}
        after = {path for line in lines[number:] for path in SYNC.findall(line)}
        files = [file.name for file in target.iterdir()] if target.is_dir() else []
        assert files or target.is_file()
        assert {source, *(f"{source}/{name}" for name in files)} <= before
        assert str(target.parent) in after
