#!/bin/bash
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
exec python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 16 --gpus 8 --nodes 2 --forward '' -- python-stub -m deepspeed.launcher.runner --hostfile hosts --num_nodes 2 --num_gpus 8 --master_port 20082 --no_local_rank --module rwkv_cluster train "$PWD/config.yaml"
## bash job.sh
