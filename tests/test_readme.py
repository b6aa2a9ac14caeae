"""README and docs keep their word: commands run or parse, what they name exists, the main job reaches its loss."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_layers import FLOORS

from rwkv_cluster import cli
from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "kernels").rglob("*.md")]
PROGRAM = "rwkv-cluster"


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=_id)


def _blocks(text: str, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def _without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def _commands(text: str) -> list[list[str]]:
    """Arguments of every command line of the program, in blocks and between backticks, without variables before it."""
    lines = [line for block in _blocks(text, "bash", "sh", "text") for line in block.splitlines()]
    lines += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", _without_blocks(text))]
    commands = [shlex.split(line, comments=True) for line in lines if re.match(rf"(\w+=\S+ )*{PROGRAM} [^.]", line)]
    return [command[command.index(PROGRAM) + 1 :] for command in commands]


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of `page`."""
    headings = re.findall(r"^#+ (.*)$", _without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    text = _without_blocks(page.read_text())
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{_id(page)}: {target}"
        assert not anchor or anchor in _anchors(linked), f"{_id(page)}: no heading for {target}"


def test_every_page_can_be_reached_from_the_readme_and_the_index() -> None:
    for start in (README, (ROOT / "docs/index.md").read_text()):
        linked = {Path(target).name for target in re.findall(r"\]\(([^)#]+)", start)}
        missing = {page.name for page in PAGES if page.parent != ROOT / "kernels/benchmarks"} - linked
        assert missing <= {"README.md", "index.md"}


@each_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    names = re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|cpp|hpp|cu|h|md|json|sh))`", _without_blocks(page.read_text()))
    for name in names:
        places = [folder / name for folder in (ROOT, ROOT / "rwkv_cluster", page.parent, ROOT / "docs")]
        is_other = name.startswith(("RWKV-", "logs/", "out/", "data/", "configs/", "report/", "launch/<"))
        assert is_other or any(place.exists() for place in places), f"{_id(page)}: {name}"


@each_page
def test_every_field_that_a_page_names_exists(page: Path) -> None:
    if page.name == "architecture.md":
        return  # it names modules, some of which are called as sections are
    sections = "|".join(name for name in Config.model_fields if name != "work_dir")
    for section, rest in re.findall(rf"`(?:--)?({sections})\.([a-z][\w.]*)", page.read_text()):
        kind: object = Config.model_fields[section].annotation
        is_other = rest.endswith((".py", ".md", ".json", ".yaml", "safetensors")) or re.search(r"\.\d", rest)
        for name in () if is_other else rest.split("."):  # a file, or a tensor of another program
            fields = getattr(kind, "model_fields", {})
            if kind is not dict and not fields:
                break  # inside a mapping of the user's own names
            assert name in fields, f"{_id(page)}: {section}.{rest}"
            kind = fields[name].annotation


@each_page
def test_every_yaml_block_is_a_configuration(page: Path) -> None:
    for block in _blocks(page.read_text(), "yaml"):
        parse_config(block.encode(), _id(page))


@each_page
def test_every_command_parses(page: Path) -> None:
    """And its overrides are fields with such values. A verb alone is the name of a command."""
    parser = cli.build_parser()
    for command in _commands(page.read_text()):
        arguments, overrides = cli.split_overrides(command)
        words = ["0" if word == "N" else word for word in arguments]
        options, unknown, code = argparse.Namespace(verb=None, target=None), [], 0
        try:
            options, unknown = parser.parse_known_args(words if len(words) > 1 else [*words, "--help"], options)
        except SystemExit as end:
            code = end.code
        assert code == 0, f"{_id(page)}: {shlex.join(command)}"
        assert not unknown or options.verb == "bench", f"{_id(page)}: {shlex.join(command)}"
        target = [f"launch.target={options.target}"] if options.target else []
        parse_config(b"launch: {container: {image: rwkv}}", _id(page), [*overrides, *target])


def test_commands_run_in_the_order_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a few files instead of the whole standard library, and four steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for index, source in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))[:12]):
        (tmp_path / "text" / f"{index}.txt").write_bytes(source.read_bytes()[:4000])
    small = ["--data.inputs=[text]", "--training.max_steps=4", "--training.micro_bsz=2", "--training.num_threads=1"]
    lines = [line.split("&&")[-1].strip() for block in _blocks(README, "bash") for line in block.splitlines()]
    ran = []
    for line in lines:
        if not line.removeprefix(".venv/bin/").startswith(PROGRAM):
            continue
        command = shlex.split(line, comments=True)[1:]
        verb = command[0]
        extra = small if verb in ("config", "prepare", "train") else []
        extra += ["--tokens", "5"] if verb == "generate" else []
        assert cli.main([*command, *extra]) == 0, (command, capsys.readouterr().err)
        ran.append(verb)
    assert ran == [
        *("train", "generate", "status"),
        *("config", "plan", "prepare", "train", "report", "eval", "inspect", "export", "consolidate", "doctor"),
    ]


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks((ROOT / "docs/python.md").read_text(), "python")
    exec(compile(example, "docs/python.md", "exec"), {"__name__": "page"})
    assert (tmp_path / "work/angles/out/rwkv-final.pth").exists()


def test_exit_codes_are_the_programs() -> None:
    from rwkv_cluster.errors import EXIT_CODES

    rows = (ROOT / "docs/operations.md").read_text().partition("| exit code |")[2].partition("##")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", rows, re.MULTILINE)} == set(EXIT_CODES)


def test_the_first_screen_has_picture_commands_and_table() -> None:
    screen = "\n".join(README.splitlines()[:40])
    assert "<img" in screen
    assert len(_commands(screen)) + screen.count("<!-- main command -->") == 3
    assert "| **has run on** |" in screen


@pytest.mark.system
def test_torchrun_command_runs(tmp_path: Path) -> None:
    lines = [line for page in PAGES for block in _blocks(page.read_text(), "bash") for line in block.splitlines()]
    (command,) = [line for line in lines if line.startswith("torchrun")]
    (tmp_path / "text.txt").write_text(README * 20)
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
    done = subprocess.run(program, cwd=tmp_path, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    stated, tolerance = map(float, re.findall(r"validation loss of ([\d.]+) ± ([\d.]+)", README)[0])
    records = (tmp_path / "work/quickstart/logs/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["val_loss"] == pytest.approx(stated, abs=tolerance)
    assert "sample:" in done.stdout
    assert "left" in done.stderr


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
PRODUCT = ("rwkv_cluster", "kernels", "launch", "configs")


def _tree() -> set[str]:
    """Every file of the page's tree, below the repository."""
    (block,) = [block for block in _blocks(ARCHITECTURE, "") if block.startswith("rwkv_cluster/")]
    files, folders = set(), list[str]()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        words = line.split()
        if words[0].endswith("/"):
            folders[depth:] = [words[0]]
        else:
            files |= {"".join(folders[:depth]) + (word if "." in word else f"{word}.py") for word in words}
    return files


def test_the_tree_of_the_architecture_page_is_the_repositorys() -> None:
    suffixes = (".py", ".c", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".css", ".yaml")
    files = {
        str(path.relative_to(ROOT))
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.name not in ("__init__.py", "__main__.py") and path.parent.name != "lib"
    }
    assert _tree() == files


def test_the_floors_of_the_architecture_page_are_those_of_the_test() -> None:
    rows = re.findall(r"^\| (\d) \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    assert {name: int(number) for number, names in rows for name in re.findall(r"`(.+?)`", names)} == FLOORS


def test_every_fault_point_is_described() -> None:
    table = ARCHITECTURE.partition("| point |")[2]
    described = {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)
    }
    sources = "".join(path.read_text() for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
    points = re.findall(r'fault_point\(\s*f?"([^"{]+)(\{?)', sources)
    plain = {name for name, computed in points if not computed}
    begun = tuple(name for name, computed in points if computed)
    assert plain <= described
    assert all(name.startswith(begun) for name in described - plain)
