#!/usr/bin/env bash
# A small TACO BERT on 1 GPU.
#
#   sbatch slurm/taco_small.sh [section.key=value ...]
#
# Submitted from the project's root; what every job script does, and its settings, are in docs/slurm.md.
#SBATCH --job-name=taco_small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
config=configs/taco_small.yaml
# shellcheck source=slurm/job.sh
. "${SLURM_SUBMIT_DIR:?submit this script with sbatch}/slurm/job.sh"
