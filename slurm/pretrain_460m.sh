#!/bin/bash
# Pretrain the 460M model on A100 nodes: `slurm/pretrain.sh pretrain_460m` under a name of its own.
#
#   sbatch slurm/pretrain_460m.sh                               # from the root of the checkout
#   sbatch slurm/pretrain_460m.sh schedule.num_steps=10         # overrides of the run
#
# All else is told in slurm/pretrain.sh. sbatch reads the lines below from this file only.

#SBATCH --job-name=pretrain_460m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

# sbatch runs a copy of this file from a spool folder, in the folder it was submitted from.
script=${MEGALITE_ROOT:-.}/slurm/pretrain.sh
if [[ ! -f $script ]]; then
    echo "error: $script is not there: submit from the root of the checkout, or with sbatch --chdir=ROOT" >&2
    exit 2
fi
exec "$script" pretrain_460m "$@"
