#!/usr/bin/env bash
# BERT-large with TACO on 4 nodes x 8 GPUs.
#
#   sbatch slurm/taco_large.sh [section.key=value ...]
#   sbatch --nodes=2 slurm/taco_large.sh 'data.train=[data/wiki]' optim.lr=3e-4
#
# Submitted from the project's root; what every job script does, and its settings, are in docs/slurm.md.
#SBATCH --job-name=taco_large
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
config=configs/taco_large.yaml
# shellcheck source=slurm/job.sh
. "${SLURM_SUBMIT_DIR:?submit this script with sbatch}/slurm/job.sh"
