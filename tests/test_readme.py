"""The README keeps its word: its commands run, its links exist, and the main job reaches the loss that it states."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_cluster import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _commands() -> list[list[str]]:
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("rwkv-cluster")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_path_in_the_map_exists() -> None:
    table = README.partition("## Where things are")[2]
    for name in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:]:
        folder = ""
        for path in re.findall(r"`([^`]+)`", name):
            here = folder + path if not (ROOT / path).exists() else path
            assert (ROOT / here).exists(), path
            folder = folder or str(Path(path).parent) + "/"


def test_commands_run_in_the_order_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a few files instead of the whole standard library, and four steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for index, source in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))[:12]):
        (tmp_path / "text" / f"{index}.txt").write_bytes(source.read_bytes()[:4000])
    small = ["--data.inputs=[text]", "--training.max_steps=4", "--training.micro_bsz=2", "--training.num_threads=1"]
    ran = []
    for command in _commands():
        verb = command[0]
        extra = small if verb in ("config", "prepare", "train") else []
        extra += ["--tokens", "5"] if verb == "generate" else []
        assert cli.main([*command, *extra]) == 0, (command, capsys.readouterr().err)
        ran.append(verb)
    first = ["config", "plan", "prepare", "train", "status", "report", "eval", "generate", "inspect", "consolidate"]
    assert ran == [*first, "doctor"]


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "work/angles/out/rwkv-final.pth").exists()


def test_exit_codes_are_the_programs() -> None:
    from rwkv_cluster.errors import EXIT_CODES

    rows = README.partition("| exit code |")[2].partition("##")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", rows, re.MULTILINE)} == set(EXIT_CODES)


@pytest.mark.system
def test_torchrun_command_runs(tmp_path: Path) -> None:
    (command,) = [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("torchrun")]
    (tmp_path / "text.txt").write_text(README * 10)
    small = ["--data.inputs=[text.txt]", "--data.validation_fraction=0", "--training.max_steps=2"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*shlex.split(command), *small], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: step 2 of 2") == 1
    assert (tmp_path / "work/quickstart/out/rwkv-final.pth").exists()


@pytest.mark.system
def test_main_command_reaches_the_stated_loss(tmp_path: Path) -> None:
    """The very command line of the first block, but for the installation that the tests run in already."""
    (command,) = re.findall(r"<!-- main command -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    train = shlex.split(command.split("&&")[-1])
    assert train[0] == ".venv/bin/rwkv-cluster"
    program = [sys.executable, "-m", "rwkv_cluster", *train[1:]]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    stated, tolerance = map(float, re.findall(r"validation loss of ([\d.]+) ± ([\d.]+)", README)[0])
    records = (tmp_path / "work/quickstart/logs/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["val_loss"] == pytest.approx(stated, abs=tolerance)
    assert "sample:" in done.stdout
    assert "left" in done.stderr
