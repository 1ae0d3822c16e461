#!/usr/bin/env bash
# BERT-large with TACO on 4 nodes x 8 GPUs, data parallel under DeepSpeed ZeRO:
#
#   sbatch slurm/taco_large.sh [section.key=value ...]
#   sbatch --nodes=2 slurm/taco_large.sh data.train=[data/wiki] optim.lr=3e-4
#
# Submitted from the project's root. One torchrun per node starts one process per GPU; the first node of the job is the
# meeting point. Submitted again, it continues the run. Settings from the environment:
#   TACO_CONFIG               configuration (configs/taco_large.yaml)
#   TACO_PYTHON               Python of the environment with the package installed (.venv/bin/python)
#   TACO_PROCESSES_PER_NODE   processes per node (--gpus-per-node)
#SBATCH --job-name=taco_large
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

# sbatch runs a copy of this file, so its own folder says nothing.
cd "$SLURM_SUBMIT_DIR"
config=${TACO_CONFIG:-configs/taco_large.yaml}
python=${TACO_PYTHON:-.venv/bin/python}
# What was asked for ("2", "a100:2"): a node that is had alone counts all its GPUs in SLURM_GPUS_ON_NODE.
gpus=${SLURM_GPUS_PER_NODE:-}
gpus=${gpus##*:}
processes=${TACO_PROCESSES_PER_NODE:-${gpus:-${SLURM_GPUS_ON_NODE:-8}}}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs that share a node must not share a port.
port=$((20000 + SLURM_JOB_ID % 20000))

export PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --kill-on-bad-exit ends the other nodes when one fails; without it they wait for the collectives to time out.
exec srun --kill-on-bad-exit=1 --wait=60 --ntasks-per-node=1 \
    "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$processes" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:$port" \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    -m pretrain.train --config "$config" "$@"
