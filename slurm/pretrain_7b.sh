#!/bin/bash
# Pretrain Llama 2 7B on 64 A100 with tensor and pipeline parallelism and ZeRO-3 together:
# `slurm/pretrain.sh llama2_7b`, whose own layout is ZeRO-3 alone, with tp_size 2 and pp_size 2.
#
#   sbatch slurm/pretrain_7b.sh data.train=PREFIX data.tokenizer=FOLDER    # from the root of the checkout
#   sbatch slurm/pretrain_7b.sh data.train=PREFIX parallel.pp_size=4       # other overrides of the run
#
# All else is told in slurm/pretrain.sh. sbatch reads the lines below from this file only.

#SBATCH --job-name=pretrain_7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600

# sbatch runs a copy of this file from a spool folder, in the folder it was submitted from.
script=${MEGALITE_ROOT:-.}/slurm/pretrain.sh
if [[ ! -f $script ]]; then
    echo "error: $script is not there: submit from the root of the checkout, or with sbatch --chdir=ROOT" >&2
    exit 2
fi
exec "$script" llama2_7b parallel.tp_size=2 parallel.pp_size=2 "$@"
