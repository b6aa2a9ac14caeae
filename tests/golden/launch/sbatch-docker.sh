#!/bin/bash
#SBATCH --job-name=rwkv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR2@120
#SBATCH --output=job.log
#SBATCH --open-mode=append
#SBATCH --export=PATH,HOME,USER,LOGNAME,LANG,LC_ALL,LD_LIBRARY_PATH,TMPDIR,OMP_NUM_THREADS,SLURM_CONF
#SBATCH --requeue
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
export RWKV_CLUSTER_ATTEMPT="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
RWKV_CLUSTER_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\n" " ")
export RWKV_CLUSTER_NODES
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
follow() { # another job goes on after this one
    excluded=$(paste -s -d , excluded 2> /dev/null)
    sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" ${excluded:+"--exclude=${excluded%,}"} job.sh >> ./jobs
}
within_limit() { # ends the job with code $1 when it has been queued again often enough
    touch requeued
    if [ "$(grep -vcx "$RWKV_CLUSTER_ATTEMPT" requeued)" -ge 100 ]; then
        echo "rwkv-cluster: queued again 100 times, launch.max_requeues. The same launch command continues"
        exit "$1"
    fi
    grep -qx "$RWKV_CLUSTER_ATTEMPT" requeued || echo "$RWKV_CLUSTER_ATTEMPT" >> requeued
}
check_nodes && srun --kill-on-bad-exit=1 --wait=60 --export=ALL --open-mode=append --output=node-%n.log docker run --rm --init --ulimit=memlock=-1 --ulimit=stack=67108864 --gpus=all --env=RWKV_CLUSTER_ALL_GPUS=1 --network=host --ipc=host --user=1000:1000 --env=HOME=/tmp --volume=/home/someone/runs:/home/someone/runs:ro --volume=/data:/data:rw --volume=/vocab:/v:ro --volume=/scratch/someone/base:/scratch/someone/base:rw --env=RWKV_CLUSTER_LAUNCH --env=RWKV_CLUSTER_ATTEMPT --env=RWKV_CLUSTER_NODES --env=SLURMD_NODENAME --env=SLURM_NODEID --env=SLURM_PROCID --env=SLURM_LOCALID --env=SLURM_NTASKS --env=SLURM_NTASKS_PER_NODE --env=SLURM_JOB_ID --env=SLURM_RESTART_COUNT --env=CUDA_VISIBLE_DEVICES --env=SLURM_STEP_GPUS --env=SLURM_JOB_GPUS registry.org/rwkv:1 python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 8 --gpus 8 -- python-stub -m torch.distributed.run --nnodes 2 --nproc-per-node 8 -m rwkv_cluster train "$PWD/config.yaml"
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
# A job that is being cancelled has another state.
if [ -e cancelled ] || [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then exit 75; fi
within_limit 75
if scontrol requeue "$SLURM_JOB_ID"; then sleep 300; fi # Slurm ends this script
echo "rwkv-cluster: this cluster does not queue jobs again; a job that follows this one goes on"
follow
exit 75
## sbatch --parsable job.sh
