#!/bin/bash
# Written by rwkv-cluster launch. Runs in the directory that holds it and config.yaml.
set -u
export RWKV_CLUSTER_LAUNCH="$PWD"
exec docker run --rm --init --shm-size=16g --ulimit=memlock=-1 --ulimit=stack=67108864 --cidfile=container.id --gpus=all --user=1000:1000 --env=HOME=/tmp --volume=/home/someone/runs:/home/someone/runs:ro --volume=/data:/data:rw --volume=/vocab:/v:ro --volume=/scratch/someone/base:/scratch/someone/base:rw --env=RWKV_CLUSTER_LAUNCH registry.org/rwkv:1 python-stub -m rwkv_cluster.launch.agent --cwd /home/someone/runs --ranks 2 --gpus 2 -- python-stub -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m rwkv_cluster train "$PWD/config.yaml"
## bash job.sh
