"""The scripts of a launch on Slurm: training, data preparation, and the array that a sweep is.

On each node a step of the job runs the agent (`agent.py`). The script outside it, which needs no container and no
Python, reads how the agents ended and queues the job again.
"""

from __future__ import annotations

import sys

from rwkv_cluster.config import Config
from rwkv_cluster.config.schema import ranks_per_node
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launch_folder import JOB_LOG
from rwkv_cluster.launch.launchers import container
from rwkv_cluster.launch.launchers.rank_command import interpreter, slurm_rank, slurm_torchrun
from rwkv_cluster.launch.launchers.script import CONFIG, HEAD, environment

# The trainer needs these of the caller's environment; all other variables stay behind, unless launch.pass_env says so.
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")

CHECK_NODES = """\
check_nodes() { # a node that cannot write here could say so nowhere else
    state=".state/$RWKV_CLUSTER_ATTEMPT"
    mkdir -p "$state"
    blind=$(SRUN sh -c '[ -w "$1" ] || echo "$SLURMD_NODENAME"' sh "$PWD/job.sh" | sort | paste -s -d , -)
    [ -n "$blind" ] || return 0
    echo "$blind" > "$state/bad"
    echo "failed 6 - $blind: $PWD cannot be written there. Mend that, or set launch.exclude" > "$state/outcome"
    return 6
}
"""
AFTER_TRAINING = """\
code=$?
how=none
if [ -e ".state/$RWKV_CLUSTER_ATTEMPT/outcome" ]; then
    read -r how said _ message < ".state/$RWKV_CLUSTER_ATTEMPT/outcome"
    echo "rwkv-cluster: $how: $message"
elif [ "$code" = 140 ]; then # SIGUSR2, before there was anything to save
    how=preempted
fi
"""
FOLLOW = """\
follow() { # another job goes on after this one
    excluded=EXCLUDE$(paste -s -d , excluded 2> /dev/null)
    sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" ${excluded:+"--exclude=${excluded%,}"} job.sh >> ./jobs
}
within_limit() { # ends the job with code $1 when it has been queued again often enough
    touch requeued
    if [ "$(grep -vcx "$RWKV_CLUSTER_ATTEMPT" requeued)" -ge LIMIT ]; then
        echo "rwkv-cluster: queued again LIMIT times, launch.max_requeues. The same launch command continues"
        exit "$1"
    fi
    grep -qx "$RWKV_CLUSTER_ATTEMPT" requeued || echo "$RWKV_CLUSTER_ATTEMPT" >> requeued
}
"""
LEAVE_OUT = """\
if [ -s ".state/$RWKV_CLUSTER_ATTEMPT/bad" ]; then
    cat ".state/$RWKV_CLUSTER_ATTEMPT/bad" >> excluded
    within_limit "$said"
    follow
    echo "rwkv-cluster: a job that follows this one goes on without $(paste -s -d , excluded)"
    exit "$said"
fi
"""
END = """\
case $how in
    preempted) ;;
    failed | stopped) exit "$said" ;;
    *) exit "$code" ;;
esac
"""
REQUEUE = """\
# A job that is being cancelled has another state.
if [ -e cancelled ] || [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then exit 75; fi
within_limit 75
if scontrol requeue "$SLURM_JOB_ID"; then sleep 300; fi # Slurm ends this script
echo "rwkv-cluster: this cluster does not queue jobs again; a job that follows this one goes on"
follow
exit 75
"""
SUBMITIT = """\
export SUBMITIT_EXECUTOR=slurm
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
[ -e "${job}_submitted.pkl" ] || cp submission.pkl "${job}_submitted.pkl"
"""
MEMBER = """\
cd -- "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" members)" || exit 6
exec bash SCRIPT >> LOG 2>&1
"""


def batch_script(config: Config, cwd: str, verb: str, *, through_submitit: bool) -> str:
    """Script for sbatch: a step with the agent on each node; the same job again after a preemption.

    verb: what the ranks run, train or, without submitit, doctor.
    through_submitit: submitit starts the agent and queues the job again; what it leaves undone the script does.
    """
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
    on_each_node = ("srun", f"--nodes={launch.num_nodes}", f"--ntasks={launch.num_nodes}", "--ntasks-per-node=1")
    check = Command((*on_each_node, "--chdir=/", "--export=ALL"))
    again = launch.requeue or launch.exclude_bad_nodes
    exclude = Command((f"{launch.exclude},",)).shell() if launch.exclude else ""
    follow = FOLLOW.replace("EXCLUDE", exclude).replace("LIMIT", str(launch.max_requeues))
    if through_submitit:
        task, what = Command((sys.executable, "-u", "-m", "submitit.core._submit")), ' "$PWD"'
    else:
        task, what = node_command(config, cwd), f" {verb} {CONFIG}"
    srun = Command(("srun", *srun_options(config, cwd), *task.argv))
    # srun of Slurm 22.05 to 23.02 does not inherit it.
    inherited = [f"export SRUN_CPUS_PER_TASK={cpus}"] if cpus else []
    lines = [
        *_directives(config, options, JOB_LOG),
        'export RWKV_CLUSTER_ATTEMPT="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        'RWKV_CLUSTER_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\\n" " ")',
        "export RWKV_CLUSTER_NODES",
        *inherited,
        'echo "rwkv-cluster: job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"',
    ]
    head = CHECK_NODES.replace("SRUN", check.shell()) + (follow if again else "")
    train = (SUBMITIT if through_submitit else "") + f"check_nodes && {srun.shell()}{what}\n"
    end = AFTER_TRAINING + (LEAVE_OUT if launch.exclude_bad_nodes else "") + END
    return "\n".join(lines) + "\n" + head + train + end + (REQUEUE if launch.requeue else "exit 75\n")


def prepare_script(config: Config, cwd: str) -> str:
    """Script for sbatch that prepares the data, without GPUs."""
    config = container.without_gpus(config)
    prepare = config.launch.prepare
    options = {
        "job-name": f"{config.launch.name}-data",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": prepare.cpus,
        "mem": prepare.mem,
        "time": prepare.time,
        "partition": prepare.partition or config.launch.partition,
    }
    engine = config.launch.container.runtime
    python = interpreter(config, engine)
    inner = Command((python, "-m", "rwkv_cluster.launch.agent", "--cwd", cwd, "--", python, "-m", "rwkv_cluster"))
    pyxis = container.srun_options(config, cwd)
    srun = Command(("srun", "--ntasks=1", "--export=ALL", *pyxis, *container.wrap(config, inner, cwd, engine).argv))
    return "\n".join([*_directives(config, options, "prepare.log"), f"exec {srun.shell()} prepare {CONFIG}"]) + "\n"


def array_script(config: Config, script: str, name: str, n_runs: int) -> str:
    """Script for sbatch whose tasks run the script `name` of the runs of a sweep, each in its own launch directory.

    script: text of that script, whose resources every task has. Line N of the file `members` is the directory of run N.
    """
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ") and "#SBATCH --output=" not in line]
    at_once = f"%{config.launch.sweep_at_once}" if config.launch.sweep_at_once else ""
    log = name.replace(".sh", ".log")
    own = [f"#SBATCH --array=0-{n_runs - 1}{at_once}", f"#SBATCH --output=sweep-%a-{log}"]
    return "\n".join(["#!/bin/bash", *lines, *own, HEAD]) + "\n" + MEMBER.replace("SCRIPT", name).replace("LOG", log)


def node_command(config: Config, cwd: str) -> Command:
    """What runs on each node, in its container, up to the trainer's verb."""
    engine = config.launch.container.runtime
    start = slurm_rank if config.launch.task_per == "rank" else slurm_torchrun
    return container.wrap(config, start(config, interpreter(config, engine), cwd), cwd, engine)


def srun_options(config: Config, cwd: str) -> tuple[str, ...]:
    """Options by which a rank that fails ends the step within a minute, and each node has its log, which goes on."""
    own = ("--kill-on-bad-exit=1", "--wait=60", "--export=ALL", "--open-mode=append", "--output=node-%n.log")
    return (*own, *container.srun_options(config, cwd))


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
    directives = [f"#SBATCH --{name}={value}" for name, value in (options | common).items() if value is not None]
    requeue = "#SBATCH --requeue" if launch.requeue else "#SBATCH --no-requeue"
    return ["#!/bin/bash", *directives, requeue, HEAD, "set -u", *environment(config)]
