#!/bin/bash
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
exec podman run --rm --init --shm-size=16g --cidfile=container.id --userns=keep-id --volume=/home/someone/runs:/home/someone/runs:ro --volume=/data:/data:rw --volume=/vocab:/v:ro --volume=/scratch/someone/base:/scratch/someone/base:rw --env=RWKV_CLUSTER_LAUNCH registry.org/rwkv:1 python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 1 -- python-stub -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 1 -m rwkv_cluster train "$PWD/config.yaml"
## bash job.sh
