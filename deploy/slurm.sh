#!/bin/bash
# One experiment on SLURM nodes, as a Ray cluster of their own that ends with it:
#   sbatch --export=ALL,STORE=/shared/store deploy/slurm.sh imagenet.yaml [options of notbugs run]
# Change the numbers below. Each node needs the same environment with notbugs, and STORE has to be a folder that all nodes
# share, or a bucket. ~/.ray/auth_token, made by `ray get-auth-token --generate`, is the cluster's token.
#SBATCH --job-name=notbugs
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=24:00:00
# A node is this job's alone: Ray ends every Ray process of a machine when it stops.
#SBATCH --exclusive
# Preempted, or without a node that failed, the job is queued again, and continues from the store.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:6379"
export RAY_AUTH_MODE=token RAY_TMPDIR=/tmp RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

srun --kill-on-bad-exit=0 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" -- \
  notbugs run "$@" --store "$STORE" --address "$address" --gpu
