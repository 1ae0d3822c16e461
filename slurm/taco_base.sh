#!/usr/bin/env bash
# BERT-base with TACO on 1 node x 8 GPUs.
#
#   sbatch slurm/taco_base.sh [section.key=value ...]
#
# Submitted from the project's root; what every job script does, and its settings, are in docs/slurm.md.
#SBATCH --job-name=taco_base
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
config=configs/taco_base.yaml
# shellcheck source=slurm/job.sh
. "${SLURM_SUBMIT_DIR:?submit this script with sbatch}/slurm/job.sh"
