#!/bin/bash
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
exec python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 2 -- python-stub -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m rwkv_cluster train "$PWD/config.yaml"
## bash job.sh
