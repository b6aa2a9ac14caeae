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
srun --kill-on-bad-exit=1 --wait=60 --export=ALL --open-mode=append --output=node-%n.log python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 4 --per-rank -- python-stub -m rwkv_cluster train "$PWD/config.yaml"
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
exit 75
## sbatch --parsable job.sh
