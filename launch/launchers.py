"""The command that starts the ranks of one node: the trainer itself, torchrun, or deepspeed's launcher."""

from __future__ import annotations

import hashlib
import sys

from rwkv_cluster.config import Config
from rwkv_cluster.launch.command import IN_LAUNCH_FOLDER, Command

HOSTFILE = "hostfile"  # in the launch directory, where the configuration names the hosts
FIRST_PORT, N_PORTS = 20_000, 10_000  # below the range that Linux gives to outgoing connections


def ranks_per_node(config: Config) -> int:
    """Processes on each node: as said, else one for each GPU, else training.devices."""
    launch = config.launch
    return launch.ranks_per_node or launch.gpus_per_node or config.training.devices


def python(config: Config) -> str:
    """The interpreter where the ranks run."""
    launch = config.launch
    in_container = launch.container.runtime != "none" or launch.target in ("docker", "podman")
    return launch.python or ("python3" if in_container else sys.executable)


def agent(config: Config, inner: Command, cwd: str) -> Command:
    """`inner` started by the agent of this node, in `cwd`."""
    gpus = config.launch.gpus_per_node if config.training.accelerator != "cpu" else None
    several = not config.launch.is_batch and config.launch.num_nodes > 1
    one_agent = several and config.launch.target == "deepspeed"  # whose launcher reaches the other nodes
    n_ranks = ranks_per_node(config) * (config.launch.num_nodes if one_agent else 1)
    options = ["--cwd", cwd, "--ranks", str(n_ranks), *(["--gpus", str(gpus)] if gpus else [])]
    options += ["--nodes", str(config.launch.num_nodes)] if several else []
    options += ["--forward", ",".join(config.launch.env)] if one_agent else []
    if config.launch.is_batch and config.launch.task_per == "rank":
        options += ["--per-rank"]
    return Command((python(config), "-m", "rwkv_cluster.launch.agent", *options, "--", *inner.argv))


def trainer(config: Config) -> Command:
    """The program of a rank, up to its verb."""
    return Command((python(config), "-m", "rwkv_cluster"))


def torchrun(config: Config) -> Command:
    """torchrun and the trainer, up to its verb.

    On several nodes outside Slurm the agents meet by c10d at launch.rdzv_endpoint, with a port and an id that follow
    from the work directory. Under Slurm each is told its place by the agent: a c10d agent that is cut off from the
    network waits for ever. On one machine the ranks meet at the loopback address: torchrun's own choice is the
    machine's name, which leads nowhere on some laptops and in some containers.
    """
    launch = config.launch
    arguments = ["--nproc-per-node", str(ranks_per_node(config))]
    if launch.is_batch:
        arguments = ["--nnodes", str(launch.num_nodes), *arguments]
    elif launch.num_nodes > 1:
        host, _, port = str(launch.rdzv_endpoint).partition(":")
        endpoint = f"{host}:{port or port_of(config.work_dir)}"
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", launch.name, "--rdzv-endpoint", endpoint]
        arguments = ["--nnodes", str(launch.num_nodes), *arguments, *meeting]
    else:
        arguments = ["--standalone", "--local-addr", "127.0.0.1", *arguments]
    return Command((python(config), "-m", "torch.distributed.run", *arguments, "-m", "rwkv_cluster"))


def deepspeed(config: Config) -> Command:
    """deepspeed's launcher and the trainer, up to its verb. On several nodes it goes there by ssh."""
    launch = config.launch
    arguments = ["--num_gpus", str(ranks_per_node(config)), "--master_port", str(port_of(config.work_dir))]
    if launch.num_nodes > 1:
        hostfile = launch.hostfile or f"{IN_LAUNCH_FOLDER}{HOSTFILE}"
        arguments = ["--hostfile", hostfile, "--num_nodes", str(launch.num_nodes), *arguments]
    start = (python(config), "-m", "deepspeed.launcher.runner")
    return Command((*start, *arguments, "--no_local_rank", "--module", "rwkv_cluster"))


def hostfile(config: Config) -> str | None:
    """Text of deepspeed's hostfile; None where none is made."""
    launch = config.launch
    if launch.target != "deepspeed" or launch.hostfile or not launch.hosts:
        return None
    return "".join(f"{host} slots={ranks_per_node(config)}\n" for host in launch.hosts)


def port_of(work_dir: str) -> int:
    """A port that other runs, with other work directories, are unlikely to have."""
    return FIRST_PORT + int.from_bytes(hashlib.sha256(work_dir.encode()).digest()[:4], "big") % N_PORTS


def start(config: Config, cwd: str) -> Command:
    """What runs on one node, up to the trainer's verb: the agent and below it what starts the ranks."""
    launch = config.launch
    if launch.target == "local" or (launch.is_batch and launch.task_per == "rank"):
        return agent(config, trainer(config), cwd)
    return agent(config, deepspeed(config) if launch.target == "deepspeed" else torchrun(config), cwd)
