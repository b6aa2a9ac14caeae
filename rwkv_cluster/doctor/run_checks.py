"""The story of an examination: every check here, then what the ranks find together, then the first thing to fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rwkv_cluster.config import Config
from rwkv_cluster.doctor import results as rows
from rwkv_cluster.doctor.checks import (
    deepspeed,
    environment,
    gpus,
    host,
    image,
    run_requirements,
    software,
    storage,
    tools,
    wkv,
)
from rwkv_cluster.doctor.checks.software import has_torch
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.distributed.checks import examined_together
from rwkv_cluster.doctor.results import Row
from rwkv_cluster.errors import RWKVClusterError
from rwkv_cluster.runtime import rank_env

Check = Callable[[CheckContext], list[Row]]
CHECKS: tuple[Check, ...] = (  # in the order in which faults are best mended
    software.versions,
    software.torch_itself,
    software.packages,
    image.image,
    gpus.driver,
    gpus.torch_cuda,
    wkv.libraries,
    wkv.self_test,
    wkv.training_step,
    software.compilers,
    deepspeed.deepspeed,
    host.processors,
    host.memory,
    host.shared_memory,
    host.limits,
    environment.variables,
    tools.slurm,
    tools.containers,
    tools.launch_tools,
    storage.storage,
    run_requirements.run_needs,
)
OF_EACH_RANK = {
    software.versions,
    software.torch_itself,
    software.packages,
    gpus.torch_cuda,
    wkv.self_test,
    wkv.training_step,
    host.processors,
    host.limits,
    environment.variables,
    run_requirements.run_needs,
}
"""The other checks tell the same to all ranks of a machine, of which the first one asks."""


@dataclass(frozen=True)
class Examination:
    """problem: the first thing to fix; None where training can start."""

    rows: list[Row]
    problem: RWKVClusterError | None


def examine(config: Config | None) -> Examination:
    """Look at this machine, and with the other ranks at their job.

    On ranks other than 0 it is empty: rank 0 speaks for all. Raises LaunchError where a rank cannot reach rank 0.
    """
    context = CheckContext(config)
    checks = CHECKS if rank_env.local_rank() == 0 else [check for check in CHECKS if check in OF_EACH_RANK]
    rows_found = [row for check in checks for row in check(context)]
    world_size = rank_env.launched_world_size() or 1
    if world_size > 1 and has_torch():
        rows_found = examined_together(rows_found, context, world_size)
    return Examination(rows_found, rows.first_problem(rows_found))
