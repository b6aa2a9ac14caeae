#!/bin/bash
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
exec python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 8 --gpus 8 --nodes 2 -- python-stub -m torch.distributed.run --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id rwkv --rdzv-endpoint gpu01:20082 -m rwkv_cluster train "$PWD/config.yaml"
## bash job.sh
