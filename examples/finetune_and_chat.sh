#!/bin/sh
# Fine-tunes weights by LoRA on conversations and asks the result a question; more options go to the training.
#   sh examples/finetune_and_chat.sh rwkv7-0.4b.pth chat.jsonl rtx-4090 "What is the capital of Ghana?"
set -eu
base=$1 data=$2 gpu=$3 question=$4
shift 4
rwkv-cluster new --task lora --base "$base" --data "$data" --gpu "$gpu" --output finetune.yaml
rwkv-cluster train finetune.yaml "$@"
printf '%s\n' "$question" | rwkv-cluster chat work/finetune --tokens 50
