"""Lines that the scripts of all launchers share. What the person reads is what bash runs; `Command` alone quotes.

A script runs in the launch directory that holds it and config.yaml, and says nothing about when it was written: the dry
run and the submission have the same bytes.
"""

from __future__ import annotations

from rwkv_cluster.config import Config
from rwkv_cluster.launch import launch_folder
from rwkv_cluster.launch.command import Command

HEAD = "# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml."
CONFIG = f'"$PWD/{launch_folder.CONFIG}"'


def environment(config: Config) -> list[str]:
    """The launch directory, what launch.env says, and launch.setup, whose lines cannot run into those that follow."""
    launch = config.launch
    lines = ['export RWKV_CLUSTER_LAUNCH="$PWD"']
    lines += [Command(("export", f"{name}={value}")).shell() for name, value in launch.env.items()]
    return lines + [f"{Command(('eval', '--', line)).shell()} || exit 6" for line in launch.setup]
