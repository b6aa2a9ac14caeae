"""Slurm and container engines: which are here, and whether launch.target finds its own."""

from __future__ import annotations

import os
import re
import shutil

from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, note, ok, problem, warning
from rwkv_cluster.doctor.subprocesses import output_of
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.runtime import rank_env

ENGINES = ("docker", "podman", "apptainer", "enroot")


def slurm(context: CheckContext) -> list[Row]:
    """Version, and whether srun starts containers (pyxis)."""
    version = output_of("sinfo", "--version")
    if version is None and shutil.which("sinfo"):
        text = "sinfo is here, but does not work"
        return [note("Slurm", text, "See what `sinfo` says: SLURM_CONF names its configuration")]
    if version is None:
        return [note("Slurm", "sinfo is not here")]
    submits = "" if shutil.which("sbatch") else ", without sbatch"
    pyxis = "with" if _has_pyxis() else "without"
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks != "1" and not rank_env.launched():
        text = f"srun started {tasks} tasks, which do not know each other: each examines its node alone"
        return [warning("Slurm", f"{version}; {text}", "Use `rwkv-cluster launch CONFIG --target sbatch --doctor`")]
    return [ok("Slurm", f"{version}{submits}, srun {pyxis} containers")]


def containers(context: CheckContext) -> list[Row]:
    """Versions of the engines that are here."""
    versions = {engine: output_of(engine, "version" if engine == "enroot" else "--version") for engine in ENGINES}
    engines = [f"{name} {_number(text)}" for name, text in versions.items() if text]
    return [ok("container engines", ", ".join(engines)) if engines else note("container engines", "none is here")]


def launch_tools(context: CheckContext) -> list[Row]:
    """Programs that `rwkv-cluster launch` needs on this machine; nothing inside what it has started."""
    config = context.config
    if config is None or context.is_inside:
        return []
    target = config.launch.target
    tools = LAUNCHERS[target].tools(config)
    for tool in tools:
        output = output_of(*tool.argv)
        if tool.output and tool.output not in (output or ""):
            return [problem("launch", *tool.fault, LaunchError)]
        if output is None:
            text = f"launch.target is {target}, but `{' '.join(tool.argv)}` does not work here"
            remedy = "Launch on a machine where it does, or with another launch.target"
            return [problem("launch", text, remedy, LaunchError)]
    return [ok("launch", f"launch.target {target} finds {tools[0].argv[0]}")] if tools else []


def _has_pyxis() -> bool:
    return "--container-image" in (output_of("srun", "--help") or "")


def _number(text: str) -> str:
    number = re.search(r"\d+(\.\d+)+", text)
    return number[0] if number else text.splitlines()[0]
