"""The launchers: LAUNCHERS has a row for each launch.target, which is all that the rest of the package asks.

Another place to run is a class like those in local.py, slurm.py and kubernetes.py, and a row here.
"""

from __future__ import annotations

from rwkv_cluster.launch.launchers.kubernetes import Kubernetes
from rwkv_cluster.launch.launchers.launcher import Launcher
from rwkv_cluster.launch.launchers.local import Local
from rwkv_cluster.launch.launchers.rank_command import deepspeed, hostfile, pdsh, torchrun, trainer
from rwkv_cluster.launch.launchers.skypilot import Skypilot
from rwkv_cluster.launch.launchers.slurm import Slurm

LAUNCHERS: dict[str, Launcher] = {
    "local": Local(trainer),
    "torchrun": Local(torchrun),
    "deepspeed": Local(deepspeed, files=hostfile, needs=pdsh),
    "docker": Local(torchrun, engine="docker"),
    "podman": Local(torchrun, engine="podman"),
    "sbatch": Slurm(),
    "slurm": Slurm(through_submitit=True),
    "kubernetes": Kubernetes(),
    "skypilot": Skypilot(),
}
