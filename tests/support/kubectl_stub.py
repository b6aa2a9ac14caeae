"""A stand-in for kubectl that knows no cluster: it writes down how it is called, and says what a test has it say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """\
#!/bin/bash
folder=FOLDER
for word; do case $word in --context=* | --namespace=*) ;; *) break ;; esac; shift_by=$((${shift_by:-0} + 1)); done
verb=${@:$((${shift_by:-0} + 1)):1}
[ "$verb ${@:$((${shift_by:-0} + 2)):1}" = "get pods" ] && verb="get pods"
{ printf '%s\\0' "$@"; echo; } >> "$folder/calls"
pwd >> "$folder/folders"
if [ -e "$folder/$verb.error" ]; then cat "$folder/$verb.error" >&2; exit 1; fi
if [ -e "$folder/$verb.out" ]; then cat "$folder/$verb.out"; fi
if [ "$verb" = delete ] && [ -e "$folder/ends" ]; then rm -f "$folder/get.out"; fi
exit 0
"""


class KubectlStub:
    """kubectl in `folder`, which is made and put first in PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "kubectl").write_text(_PROGRAM.replace("FOLDER", str(folder)))
        (folder / "kubectl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def prints(self, verb: str, text: str) -> None:
        """What `kubectl VERB` prints from now on."""
        (self.folder / f"{verb}.out").write_text(text)

    def says(self, verb: str, answer: dict[str, Any]) -> None:
        """The object that `kubectl VERB` has from now on."""
        self.prints(verb, json.dumps(answer))

    def fails(self, verb: str, error: str) -> None:
        """What `kubectl VERB` ends with from now on."""
        (self.folder / f"{verb}.error").write_text(error)

    def ends_after_delete(self) -> None:
        """Let an object be gone once it is deleted."""
        (self.folder / "ends").touch()

    def calls(self) -> list[list[str]]:
        """Arguments of each call, in order."""
        path = self.folder / "calls"
        return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []

    def folders(self) -> list[str]:
        """Where it was called from, in order."""
        return (self.folder / "folders").read_text().splitlines()
