"""The script of a launch, for every target: what the person reads is what bash runs, with quoting in `Command` alone.

A script runs in the launch directory that holds it and config.yaml, and says nothing about when it was written: the
dry run and the submission have the same bytes.
"""

from __future__ import annotations

from rwkv_cluster.config import Config
from rwkv_cluster.launch import container
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.torchrun import python, ranks_per_node, start

# The trainer needs these of the caller's environment; all other variables stay behind, unless launch.pass_env says so.
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")
HEAD = "# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml."
TRAIN = ' train "$PWD/config.yaml"'
PREPARE = ' prepare "$PWD/config.yaml"'

AFTER_TRAINING = """\
code=$?
how=none
if [ -e ".state/$RWKV_CLUSTER_ATTEMPT/outcome" ]; then
    read -r how said message < ".state/$RWKV_CLUSTER_ATTEMPT/outcome"
    echo "rwkv-cluster: $how: $message"
fi
case $how in
    preempted) ;;
    failed | stopped) exit "$said" ;;
    *) exit "$code" ;;
esac
"""
REQUEUE = """\
# A job that is being cancelled has another state.
if [ -e cancelled ] || [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then exit 75; fi
if [ -e requeued ] && [ "$(wc -l < requeued)" -ge LIMIT ]; then
    echo "rwkv-cluster: queued again LIMIT times, launch.max_requeues. The same launch command continues"
    exit 75
fi
echo "$RWKV_CLUSTER_ATTEMPT" >> requeued
if scontrol requeue "$SLURM_JOB_ID"; then sleep 300; fi # Slurm ends this script
echo "rwkv-cluster: this cluster does not queue jobs again; a job that follows this one goes on"
sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" job.sh >> ./jobs
exit 75
"""


def local_script(config: Config, cwd: str) -> str:
    """Script for the targets that start processes here: local, torchrun, deepspeed, docker and podman."""
    command = container.wrap(config, start(config, cwd), cwd)
    lines = ["#!/bin/bash", HEAD, "set -u", *_environment(config), f"exec {command.shell()}{TRAIN}"]
    return "\n".join(lines) + "\n"


def batch_script(config: Config, cwd: str) -> str:
    """Script for sbatch: a step with the agent on each node; the same job again after a preemption."""
    launch = config.launch
    tasks = ranks_per_node(config) if launch.task_per == "rank" else 1
    cpus = max(1, launch.cpus_per_node // tasks) if launch.cpus_per_node else None
    options = {
        "job-name": launch.name,
        "nodes": launch.num_nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cpus,
        "gpus-per-node": launch.gpus_per_node,
        "mem": launch.mem,
        "time": launch.time,
        "partition": launch.partition,
        "signal": f"USR2@{launch.signal_s}",
    }
    srun = Command(("srun", *srun_options(config, cwd), *container.wrap(config, start(config, cwd), cwd).argv))
    again = REQUEUE.replace("LIMIT", str(launch.max_requeues)) if launch.requeue else "exit 75\n"
    lines = [
        *_directives(config, options, "job.log"),
        'export RWKV_CLUSTER_ATTEMPT="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        'RWKV_CLUSTER_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\\n" " ")',
        "export RWKV_CLUSTER_NODES",
        *([f"export SRUN_CPUS_PER_TASK={cpus}"] if cpus else []),  # srun of Slurm 22.05 to 23.02 does not inherit it
        'echo "rwkv-cluster: job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"',
        f"{srun.shell()}{TRAIN}",
    ]
    return "\n".join(lines) + "\n" + AFTER_TRAINING + again


def prepare_script(config: Config, cwd: str) -> str:
    """Script for sbatch that prepares the data, without GPUs."""
    wanted = config.launch.prepare
    options = {
        "job-name": f"{config.launch.name}-data",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": wanted.cpus,
        "mem": wanted.mem,
        "time": wanted.time,
        "partition": wanted.partition or config.launch.partition,
    }
    agent = (python(config), "-m", "rwkv_cluster.launch.agent", "--cwd", cwd, "--")
    inner = Command((*agent, python(config), "-m", "rwkv_cluster"))
    pyxis = container.srun_options(config, cwd)
    srun = Command(("srun", "--ntasks=1", "--export=ALL", *pyxis, *container.wrap(config, inner, cwd).argv))
    return "\n".join([*_directives(config, options, "prepare.log"), f"exec {srun.shell()}{PREPARE}"]) + "\n"


def srun_options(config: Config, cwd: str) -> tuple[str, ...]:
    """A rank that fails ends the step, at the latest a minute later; each node has its log, which goes on."""
    kept = ("--kill-on-bad-exit=1", "--wait=60", "--export=ALL", "--open-mode=append", "--output=node-%n.log")
    return (*kept, *container.srun_options(config, cwd))


def _directives(config: Config, options: dict[str, object], log: str) -> list[str]:
    launch = config.launch
    common = {
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
        "comment": f'"{launch.comment}"' if launch.comment else None,
        "output": log,
        "open-mode": "append",
        "export": ",".join([*KEPT, "SLURM_CONF", *launch.pass_env]),
        **launch.slurm_parameters,
    }
    given = [f"#SBATCH --{name}={value}" for name, value in (options | common).items() if value is not None]
    requeue = "#SBATCH --requeue" if launch.requeue else "#SBATCH --no-requeue"
    return ["#!/bin/bash", *given, requeue, HEAD, "set -u", *_environment(config)]


def _environment(config: Config) -> list[str]:
    """The launch directory, what launch.env says, and launch.setup, whose lines cannot run into those that follow."""
    launch = config.launch
    lines = ['export RWKV_CLUSTER_LAUNCH="$PWD"']
    lines += [Command(("export", f"{name}={value}")).shell() for name, value in launch.env.items()]
    return lines + [f"{Command(('eval', '--', line)).shell()} || exit 6" for line in launch.setup]
