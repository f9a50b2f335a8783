#!/bin/bash
# A shell on one node with a GPU per task, for an hour, to try things out: like sbatch's jobs, but by hand.
#
#   slurm/debug.sh                                            # 1 node of 8 GPUs
#   slurm/debug.sh --nodes=2 --time=00:20:00 --partition=dev  # options are salloc's, and win
#   slurm/debug.sh -- slurm/pretrain_460m.sh schedule.num_steps=10 output_dir=runs/try    # one command, no shell
#
# In the shell: `slurm/pretrain_460m.sh schedule.num_steps=10 output_dir=runs/try` trains on its nodes;
# `srun --overlap --ntasks-per-node=1 nvidia-smi` looks at them, also beside the training.

set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
(($#)) && shift
exec salloc --job-name=debug --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --exclusive --mem=0 --time=01:00:00 \
    ${options[@]+"${options[@]}"} "$@"
