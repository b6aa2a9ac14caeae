"""A command inside docker, podman, apptainer or pyxis, with the directories of the run at their own paths."""

from __future__ import annotations

import os

from rwkv_cluster.config import Config
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.launch.command import ALL_GPUS_VARIABLE, Command
from rwkv_cluster.launch.launch_folder import CONTAINER_ID

# What the ranks of a Slurm step know of their place; other runtimes pass the whole environment.
PASSED = (
    *("RWKV_CLUSTER_LAUNCH", "RWKV_CLUSTER_ATTEMPT", "RWKV_CLUSTER_NODES", "SLURMD_NODENAME", "SLURM_NODEID"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID"),
    *("SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"),
)

GPU_PARAMETERS = ("gres", "gpus", "tres")
"""First words of Slurm's options that ask for GPUs: --gres=gpu:a100:8, --gpus-per-task=1."""


def wants_gpus(config: Config) -> bool:
    """Whether a container gets its node's GPUs: by their number, or as Slurm is asked for them by type."""
    parameters = config.launch.slurm_parameters.items()
    by_type = any("gpu" in f"{name}={value}" for name, value in parameters if name.split("-")[0] in GPU_PARAMETERS)
    return bool(config.launch.gpus_per_node) or by_type


def without_gpus(config: Config) -> Config:
    """`config` for a job of Slurm, and its container, that asks for none: neither by number nor by type.

    What says how GPUs are used goes too, such as mem-per-gpu; of gres=gpu:a100:8,nvme:1 the rest stays.
    """
    parameters = {}
    for name, value in config.launch.slurm_parameters.items():
        by_type = name.split("-")[0] in GPU_PARAMETERS
        rest = ",".join(part for part in value.split(",") if "gpu" not in part) if by_type else value
        if rest and "gpu" not in name:
            parameters[name] = rest
    launch = config.launch.model_copy(update={"gpus_per_node": None, "slurm_parameters": parameters})
    return config.model_copy(update={"launch": launch})


def mounts(config: Config, cwd: str) -> list[tuple[str, str, str]]:
    """(host, container, ro or rw). The work directory comes last, because it may lie in the current one."""
    places = [(cwd, cwd, "ro")]
    for mount in config.launch.container.mounts:
        host, *rest = mount.split(":")
        places.append((host, rest[0] if rest else host, rest[1] if len(rest) > 1 else "rw"))
    places.append((config.work_dir, config.work_dir, "rw"))
    for host, _, _ in places:
        if ":" in host or "," in host or "\\" in host:
            raise LaunchError(f"{host} cannot be mounted in a container: its name has a colon, comma or backslash")
    return places


def wrap(config: Config, inner: Command, cwd: str, engine: str, *, has_id_file: bool = False) -> Command:
    """`inner` as `engine` runs it: docker, podman or apptainer; pyxis, an option of srun, adds nothing.

    has_id_file: whether the container is launched by itself and cancelled by its id. Under Slurm it ends with the step.
    """
    if engine == "apptainer":
        return _apptainer(config, inner, cwd)
    return _docker(config, inner, cwd, engine, has_id_file) if engine in ("docker", "podman") else inner


def srun_options(config: Config, cwd: str) -> tuple[str, ...]:
    """Options that pyxis adds to srun."""
    container = config.launch.container
    if container.runtime != "pyxis":
        return ()
    places = ",".join(":".join(mount) for mount in mounts(config, cwd))
    options = (f"--container-image={container.image}", f"--container-mounts={places}", "--no-container-mount-home")
    return (*options, *container.extra_args)


def _apptainer(config: Config, inner: Command, cwd: str) -> Command:
    container = config.launch.container
    binds = tuple(f"--bind={':'.join(mount)}" for mount in mounts(config, cwd))
    gpus = ("--nv",) if wants_gpus(config) else ()
    return Command(("apptainer", "exec", *gpus, *binds, *container.extra_args, str(container.image), *inner.argv))


def _docker(config: Config, inner: Command, cwd: str, engine: str, has_id_file: bool) -> Command:
    """Run as the caller, who then owns what the run writes; with the shared and locked memory that NCCL needs."""
    launch, container = config.launch, config.launch.container
    options = ["run", "--rm", "--init", f"--shm-size={container.shm_size}"]
    if wants_gpus(config):  # a user's podman may not raise limits: it passes on what the user has
        raises = engine == "docker" or os.getuid() == 0
        options += ["--ulimit=memlock=-1", "--ulimit=stack=67108864"] if raises else ["--ulimit=host"]
    if has_id_file:
        options += [f"--cidfile={CONTAINER_ID}"]
    if wants_gpus(config):
        options += ["--gpus=all"] if engine == "docker" else ["--device=nvidia.com/gpu=all"]
        if engine == "docker" and not has_id_file:  # its daemon starts it outside of the job's cgroup
            options += [f"--env={ALL_GPUS_VARIABLE}=1"]
    if launch.num_nodes > 1 or not has_id_file:
        options += ["--network=host", "--ipc=host"]
        options.remove(f"--shm-size={container.shm_size}")  # the host's
    if container.user == "caller":
        who = f"--user={os.getuid()}:{os.getgid()}"
        keeps_id = engine == "podman" and os.getuid() != 0  # root's podman maps no ids and refuses the option
        options += ["--userns=keep-id"] if keeps_id else [who, "--env=HOME=/tmp"]
    options += [f"--volume={':'.join(mount)}" for mount in mounts(config, cwd)]
    passed = PASSED[:1] if has_id_file else PASSED
    options += [f"--env={name}" for name in (*passed, *launch.env, *launch.pass_env)]
    return Command((engine, *options, *container.extra_args, str(container.image), *inner.argv))
