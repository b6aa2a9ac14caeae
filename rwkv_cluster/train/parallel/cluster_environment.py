"""Which rank a process is, as Lightning asks for it.

Left to itself, Lightning looks for Slurm, LSF and MPI in the environment. An allocation's variables would then decide
what a plain command in it does.
"""

from __future__ import annotations

from pytorch_lightning.plugins.environments import LightningEnvironment

from rwkv_cluster.runtime import rank_env


class RankEnvironment(LightningEnvironment):
    """The ranks of `rwkv_cluster.runtime.rank_env`. Without a launcher Lightning starts those beyond the first here.

    world_size: ranks of the run. devices: of them on each machine.
    """

    def __init__(self, world_size: int, devices: int) -> None:
        super().__init__()
        self.set_world_size(world_size)
        self._devices = devices

    @property
    def creates_processes_externally(self) -> bool:
        """Whether nothing is left to start; Lightning would also set a launcher's variables for a run of one rank."""
        return rank_env.launched() or self.world_size() == 1

    def global_rank(self) -> int:
        return rank_env.rank()

    def local_rank(self) -> int:
        return rank_env.local_rank()

    def node_rank(self) -> int:
        return rank_env.rank() // self._devices

    def teardown(self) -> None:
        """Leaves WORLD_SIZE in the environment, where the parent removes it: a process may train again."""
