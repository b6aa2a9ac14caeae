#!/bin/bash
#SBATCH --job-name=rwkv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --signal=USR2@120
#SBATCH --output=job.log
#SBATCH --open-mode=append
#SBATCH --export=PATH,HOME,USER,LOGNAME,LANG,LC_ALL,LD_LIBRARY_PATH,TMPDIR,OMP_NUM_THREADS,SLURM_CONF
#SBATCH --no-requeue
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
export RWKV_CLUSTER_ATTEMPT="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
RWKV_CLUSTER_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\n" " ")
export RWKV_CLUSTER_NODES
export SRUN_CPUS_PER_TASK=4
echo "rwkv-cluster: job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
check_nodes() { # a node that cannot write here could say so nowhere else
    state=".state/$RWKV_CLUSTER_ATTEMPT"
    mkdir -p "$state"
    blind=$(srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --chdir=/ --export=ALL sh -c '[ -w "$1" ] || echo "$SLURMD_NODENAME"' sh "$PWD/job.sh" | sort | paste -s -d , -)
    [ -n "$blind" ] || return 0
    echo "$blind" > "$state/bad"
    echo "failed 6 - $blind: $PWD cannot be written there. Mend that, or set launch.exclude" > "$state/outcome"
    return 6
}
check_nodes && srun --kill-on-bad-exit=1 --wait=60 --export=ALL --open-mode=append --output=node-%n.log python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 4 --per-rank -- python-stub -m rwkv_cluster train "$PWD/config.yaml"
code=$?
how=none
if [ -e ".state/$RWKV_CLUSTER_ATTEMPT/outcome" ]; then
    read -r how said _ message < ".state/$RWKV_CLUSTER_ATTEMPT/outcome"
    echo "rwkv-cluster: $how: $message"
elif [ "$code" = 140 ]; then # SIGUSR2, before there was anything to save
    how=preempted
fi
case $how in
    preempted) ;;
    failed | stopped) exit "$said" ;;
    *) exit "$code" ;;
esac
exit 75
## sbatch --parsable job.sh
