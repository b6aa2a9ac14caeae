"""Config -> Plan: every byte that launching writes, and every command that it runs. Planning touches nothing."""

from __future__ import annotations

from pathlib import Path

from rwkv_cluster.config import Config
from rwkv_cluster.config.launch import PrepareJobConfig
from rwkv_cluster.launch.command import refuse_control_characters
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.launch.launchers.launcher import Plan
from rwkv_cluster.workdir import WorkDir


def plan(config: Config, cwd: Path, verb: str = "train") -> Plan:
    """The launch of `config` by a caller who stands in `cwd`. Raises LaunchError or ConfigError.

    verb: what the ranks run: train, or doctor to examine where they would.
    """
    if verb == "doctor":
        config = _one_job(config)
    config = config.model_copy(update={"work_dir": str(WorkDir(config.work_dir).root)})
    refuse_control_characters(str(cwd), "the current directory")
    return LAUNCHERS[config.launch.target].script(config, cwd, verb)


def _one_job(config: Config) -> Config:
    """`config` as one job with the same resources that nothing precedes, follows or queues again."""
    plain = {"sweep": [], "requeue": False, "exclude_bad_nodes": False, "prepare": PrepareJobConfig()}
    return config.model_copy(update={"launch": config.launch.model_copy(update=plain)})
