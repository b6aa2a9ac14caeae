"""Imports only go down, nothing is knotted, and what runs on a login node never loads torch."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {  # by the longest matching prefix below rwkv_cluster
    "errors": 0, "runtime": 0,
    "config": 1, "configs": 1, "workdir": 1,
    "tokenizer": 2,
    "adapters": 3, "interchange": 3, "kernels": 3, "model": 3,
    "data": 4, "launch": 4,
    "train": 5,
    "chat": 6, "planning": 6, "doctor": 6, "report": 6,
    "bench": 7, "cli": 7, "commands": 7, "pipeline": 7, "__main__": 7,
}  # fmt: skip
STRANGERS = {"launch": ("kernels", "model", "data", "train"), "kernels": ("config",)}
LIGHT = """
    rwkv_cluster rwkv_cluster.config rwkv_cluster.config.loader rwkv_cluster.config.recipes rwkv_cluster.workdir
    rwkv_cluster.commands rwkv_cluster.report.status rwkv_cluster.report.write
    rwkv_cluster.launch.command rwkv_cluster.launch.agent
    rwkv_cluster.launch.submit rwkv_cluster.tokenizer rwkv_cluster.data.sampler
    rwkv_cluster.data.preparation.prepare rwkv_cluster.data.inputs.readers rwkv_cluster.data.binidx
    rwkv_cluster.data.converters rwkv_cluster.interchange.layouts rwkv_cluster.interchange.safetensors_header
    rwkv_cluster.interchange.export.table
    rwkv_cluster.model.flops rwkv_cluster.model.versions.table
    rwkv_cluster.runtime.gpu_specs rwkv_cluster.planning.run_plan rwkv_cluster.planning.formatting
    rwkv_cluster.planning.step_time rwkv_cluster.planning.fit
""".split()  # noqa: SIM905 -- a list of words reads better


def modules() -> dict[str, Path]:
    """Dotted name below rwkv_cluster -> file, without the package itself, which names things lazily."""
    found = {}
    for folder in ("rwkv_cluster", "kernels", "launch", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if folder == "rwkv_cluster" else parts
            found[".".join(part for part in parts if part != "__init__")] = path
    del found[""]
    return found


@functools.cache
def imported(path: Path, known: frozenset[str]) -> set[str]:
    """Modules below rwkv_cluster that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import. Write rwkv_cluster...."
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in submodules if name.removeprefix("rwkv_cluster.") in known}
            names |= inside or {str(node.module)}
    below = {name.removeprefix("rwkv_cluster.") for name in names if name.startswith("rwkv_cluster.")}
    assert below <= known, f"{path} imports what does not exist: {below - known}"
    return below


def floor(module: str) -> int:
    names = module.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    found = next((FLOORS[prefix] for prefix in prefixes if prefix in FLOORS), None)
    assert found is not None, f"rwkv_cluster.{module} has no floor: give it one in tests/test_layers.py"
    return found


def test_imports_go_down_and_strangers_stay_strangers() -> None:
    found = modules()
    for module, path in found.items():
        for target in imported(path, frozenset(found)):
            assert floor(target) <= floor(module), f"{module} imports {target}, which is above it"
            refused = STRANGERS.get(module.split(".")[0], ())
            assert target.split(".")[0] not in refused, f"{module} must not know {target}"


def test_no_module_imports_itself_by_a_detour() -> None:
    found = modules()
    graph = {module: imported(path, frozenset(found)) - {module} for module, path in found.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a cycle


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.split())


def test_the_login_node_half_leaves_torch_alone() -> None:
    loaded = loaded_by("\n".join(f"import {module}" for module in LIGHT))
    assert "rwkv_cluster" in loaded
    assert not loaded & {"torch", "pytorch_lightning", "deepspeed"}


def test_a_dry_run_of_a_launch_leaves_torch_alone(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"work_dir: {tmp_path / 'work'}\nlaunch: {{target: sbatch}}\n")
    arguments = ["launch", str(tmp_path / "run.yaml"), "--dry-run"]
    code = f"from rwkv_cluster.cli import main; assert main({arguments}) == 0"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; assert not {{'torch', 'numpy', 'submitit'}} & set(sys.modules)"],
        env={"PATH": str(tmp_path)},  # neither Slurm nor docker
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "#SBATCH --output=job.log" in run.stdout
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_by(f"from rwkv_cluster.cli import main; assert main({arguments}) == 0")
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "pytorch_lightning"}


def test_the_config_verb_leaves_torch_alone(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("work_dir: w\n")
    code = f"from rwkv_cluster.cli import main; assert main(['config', {str(tmp_path / 'run.yaml')!r}]) == 0"
    assert not loaded_by(code) & {"torch", "numpy"}
