"""Context of the checks: this machine, and the run's configuration if one was named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.config import Config
from rwkv_cluster.launch.launchers import LAUNCHERS
from rwkv_cluster.runtime import rank_env
from rwkv_cluster.runtime.exit_report import LAUNCH_VARIABLE
from rwkv_cluster.workdir import WorkDir

IMAGE_VARIABLE = "RWKV_CLUSTER_IMAGE"  # in a container image: the file that says what is in it


@dataclass(frozen=True)
class CheckContext:
    """config: of the run; None where only the machine is asked about."""

    config: Config | None = None

    @property
    def folder(self) -> Path:
        """The work directory or, before it exists, the nearest folder above it; without a run the current one."""
        if self.config is None:
            return Path.cwd()
        root = WorkDir(self.config.work_dir).root
        return next(folder for folder in (root, *root.parents) if os.path.isdir(folder))

    @property
    def is_inside(self) -> bool:
        """Whether a launcher, an image or a Slurm job has brought this process to where ranks run."""
        return rank_env.launched() or bool({LAUNCH_VARIABLE, IMAGE_VARIABLE, "SLURM_JOB_ID"} & os.environ.keys())

    @property
    def runs_here(self) -> bool:
        """Whether the ranks run where this process does, and not where a container engine or Slurm puts them."""
        return self.is_inside or self.config is None or LAUNCHERS[self.config.launch.target].runs_here
