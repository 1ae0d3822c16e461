#!/usr/bin/env bash
# First thing in every task of a training step: caches on this node, and the variables by which a rank knows its place.
#
#   srun slurm/task.sh PROGRAM ARGUMENTS...
#
# What a node or a task is can only be said here, inside srun: the job script runs on one node of them.
set -euo pipefail

if [ "$TACO_LAUNCHER" = srun ]; then
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$TACO_PROCESSES_PER_NODE
fi

# Compilers' caches: thousands of small files, which a shared home takes badly. Nobody else's folder is ever used.
[ -w "${TMPDIR:-/tmp}" ] || export TMPDIR=/tmp # that of the first node may be missing here
cache=${TMPDIR:-/tmp}/taco-$UID
mkdir -m 700 "$cache" 2>/dev/null || true
[ -O "$cache" ] && [ ! -L "$cache" ] || cache=$(mktemp -d)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions} CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$cache/cuda}
exec "$@"
