"""The command that starts the ranks of one node: the agent, and below it the trainer, torchrun or deepspeed's launcher.

A function of the configuration, the interpreter where the ranks run (`interpreter`) and the directory to run in gives
the command up to the trainer's verb.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

from rwkv_cluster.config import Config
from rwkv_cluster.config.schema import ranks_per_node
from rwkv_cluster.launch.command import IN_LAUNCH_FOLDER, Command
from rwkv_cluster.launch.launch_folder import HOSTFILE
from rwkv_cluster.launch.launchers.launcher import Tool

FIRST_PORT, N_PORTS = 20_000, 10_000  # below the range that Linux gives to outgoing connections


def interpreter(config: Config, engine: str) -> str:
    """The Python where the ranks run. engine: that of their container, or none."""
    return config.launch.python or (sys.executable if engine == "none" else "python3")


def trainer(config: Config, python: str, cwd: str) -> Command:
    """One rank: the trainer itself."""
    return _agent(config, (python, "-m", "rwkv_cluster"), cwd, ranks_per_node(config))


def slurm_rank(config: Config, python: str, cwd: str) -> Command:
    """The trainer as the one rank of a Slurm task; each task has an agent of its own."""
    return _agent(config, (python, "-m", "rwkv_cluster"), cwd, ranks_per_node(config), "--per-rank")


def torchrun(config: Config, python: str, cwd: str) -> Command:
    """torchrun on this machine, or on one of several outside Slurm.

    On several nodes the agents meet by c10d at launch.rdzv_endpoint, with a port and an id that follow from the work
    directory. On one machine the ranks meet at the loopback address: torchrun's own choice is the machine's name, which
    leads nowhere on some laptops and in some containers.
    """
    launch = config.launch
    count = ("--nproc-per-node", str(ranks_per_node(config)))
    if launch.num_nodes == 1:
        arguments = ("--standalone", "--local-addr", "127.0.0.1", *count)
        return _agent(config, _torchrun(python, arguments), cwd, ranks_per_node(config))
    host, _, port = str(launch.rdzv_endpoint).partition(":")
    endpoint = f"{host}:{port or port_of(config.work_dir)}"
    meeting = ("--rdzv-backend", "c10d", "--rdzv-id", launch.name, "--rdzv-endpoint", endpoint)
    nodes = str(launch.num_nodes)
    inner = _torchrun(python, ("--nnodes", nodes, *count, *meeting))
    return _agent(config, inner, cwd, ranks_per_node(config), "--nodes", nodes)


def slurm_torchrun(config: Config, python: str, cwd: str) -> Command:
    """torchrun as the one task of a Slurm node. The agent tells it its place.

    A c10d agent that is cut off from the network would wait for ever.
    """
    arguments = ("--nnodes", str(config.launch.num_nodes), "--nproc-per-node", str(ranks_per_node(config)))
    return _agent(config, _torchrun(python, arguments), cwd, ranks_per_node(config))


def joined_torchrun(config: Config, python: str, cwd: str, node_variable: str, *further: str) -> Command:
    """torchrun on one of several machines that are started one by one. The agents meet, and tell it its place.

    node_variable: has the machine's number. further: options of the agent.
    """
    arguments = ("--nnodes", str(config.launch.num_nodes), "--nproc-per-node", str(ranks_per_node(config)))
    options = ("--node-variable", node_variable, "--echo", *further)
    return _agent(config, _torchrun(python, arguments), cwd, ranks_per_node(config), *options)


def deepspeed(config: Config, python: str, cwd: str) -> Command:
    """deepspeed's launcher. On several nodes it goes there by ssh, so that one agent has all the ranks."""
    launch = config.launch
    arguments = ["--num_gpus", str(ranks_per_node(config)), "--master_port", str(port_of(config.work_dir))]
    options: list[str] = []
    if launch.num_nodes > 1:
        path = launch.hostfile or f"{IN_LAUNCH_FOLDER}{HOSTFILE}"
        arguments = ["--hostfile", path, "--num_nodes", str(launch.num_nodes), *arguments]
        options = ["--nodes", str(launch.num_nodes), "--forward", ",".join(launch.env)]
    start = (python, "-m", "deepspeed.launcher.runner")
    inner = (*start, *arguments, "--no_local_rank", "--module", "rwkv_cluster")
    return _agent(config, inner, cwd, ranks_per_node(config) * launch.num_nodes, *options)


def hostfile(config: Config) -> dict[str, str]:
    """deepspeed's hostfile, as name and text; empty where none is made."""
    launch = config.launch
    if launch.hostfile or not launch.hosts:
        return {}
    return {HOSTFILE: "".join(f"{host} slots={ranks_per_node(config)}\n" for host in launch.hosts)}


def pdsh(config: Config) -> tuple[Tool, ...]:
    """The program by which deepspeed's launcher reaches other nodes."""
    return (Tool(("pdsh", "-V")),) if config.launch.num_nodes > 1 else ()


def port_of(work_dir: str) -> int:
    """A port that other runs, with other work directories, are unlikely to have."""
    return FIRST_PORT + int.from_bytes(hashlib.sha256(work_dir.encode()).digest()[:4], "big") % N_PORTS


def _torchrun(python: str, arguments: Sequence[str]) -> tuple[str, ...]:
    return (python, "-m", "torch.distributed.run", *arguments, "-m", "rwkv_cluster")


def _agent(config: Config, inner: Sequence[str], cwd: str, n_ranks: int, *further: str) -> Command:
    """`inner`, whose first word is the interpreter, started by the agent of this node in `cwd`."""
    options = ["--cwd", cwd, "--ranks", str(n_ranks)]
    if config.launch.gpus_per_node and config.training.accelerator != "cpu":
        options += ["--gpus", str(config.launch.gpus_per_node)]
    return Command((inner[0], "-m", "rwkv_cluster.launch.agent", *options, *further, "--", *inner))
