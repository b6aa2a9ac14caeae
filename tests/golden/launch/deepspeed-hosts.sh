#!/bin/bash
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
export NCCL_DEBUG=INFO
exec python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 4 --nodes 2 --forward NCCL_DEBUG -- python-stub -m deepspeed.launcher.runner --hostfile @launch/hostfile --num_nodes 2 --num_gpus 2 --master_port 20082 --no_local_rank --module rwkv_cluster train "$PWD/config.yaml"
## bash job.sh
