"""Docstrings stand alone, parameter lists are short, and a folder can be taken in at a glance."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_PARAMETERS = 7
MAX_FILES = 13
PACKAGES = ("rwkv_cluster", "kernels", "launch", "configs")
PREPOSITIONS = """
    about above across after against along among around as at before behind below beneath beside besides between beyond
    by despite during except for from in inside into like near of off on onto out outside over past per since than
    through throughout to toward towards under underneath until up upon via with within without
""".split()  # noqa: SIM905 -- a list of words reads better
REDIRECT = re.compile(r"(?:See|Same as|The same as|Likewise)\b")

SIGNATURES = ["rwkv_cluster/pipeline.py:__init__"]  # rwkv-trainer's, which scripts that move over from it call

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = ast.Module | ast.ClassDef | Function


def _documented(node: Node, name: str) -> Iterator[tuple[str, Node]]:
    """A module, class or function and all that are defined in it, with their dotted names."""
    yield name, node
    for child in ast.walk(node):
        if child is not node and isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{name}:{child.name}", child


@functools.cache
def _definitions(folder: str) -> list[tuple[str, Node]]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [each for path in files for each in _documented(ast.parse(path.read_text()), str(path.relative_to(ROOT)))]


def _depends_on_another(docstring: str) -> bool:
    first = docstring.strip().partition("\n")[0]
    return re.split(r"\W", first, maxsplit=1)[0].lower() in PREPOSITIONS or bool(REDIRECT.match(first))


def _parameters(function: Function) -> list[str]:
    """Names of the parameters that a caller may give, without self and cls, *args and **kwargs."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_the_first_line_of_a_docstring_stands_alone() -> None:
    """It begins with a noun or a verb: neither with a preposition, nor with the name of another docstring."""
    dependent = {
        name
        for folder in PACKAGES
        for name, node in _definitions(folder)
        if _depends_on_another(ast.get_docstring(node) or "")
    }
    assert sorted(dependent) == []


def test_a_docstring_that_leans_on_another_is_recognised() -> None:
    leaning = ["Of a run.", "As `prepare` does.", "See `Plan`.", "Same as above.", "With one rank: the loss."]
    standing = ["Forward pass.", "Offsets of the rows.", "Asks the scheduler.", "`--help` in words.", "Seed of a run."]
    assert all(map(_depends_on_another, leaning))
    assert not any(map(_depends_on_another, standing))


def test_functions_have_few_parameters() -> None:
    """Operators of kernels/ take as many tensors as their mathematics."""
    long = {
        name
        for folder in ("rwkv_cluster", "launch")
        for name, node in _definitions(folder)
        if isinstance(node, Function) and len(_parameters(node)) > MAX_PARAMETERS
    }
    assert sorted(long.difference(SIGNATURES)) == []


def test_folders_have_few_files() -> None:
    counts: dict[str, int] = {}
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            place = str(path.parent.relative_to(ROOT))
            counts[place] = counts.get(place, 0) + (path.name != "__init__.py")
    assert sorted({place for place, count in counts.items() if count > MAX_FILES}) == []


def test_every_package_is_installed() -> None:
    """pyproject.toml names them, for kernels, launch and configs lie beside rwkv_cluster."""
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    folders = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")}
    found = {".".join(folder.parts).removeprefix("rwkv_cluster.") for folder in folders}
    named = {name.removeprefix("rwkv_cluster.") for name in re.findall(r'"([\w.]+)"', listed[1])}
    assert named == found
