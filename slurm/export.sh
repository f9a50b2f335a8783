#!/bin/bash
# A run to a Hugging Face folder, compared with transformers' computation, and then measured.
#
#   sbatch --dependency=afterok:JOBID --kill-on-invalid-dep=yes slurm/export.sh RUN_DIR OUTPUT [OPTIONS]  # after training
#   sbatch slurm/export.sh runs/first exported --perplexity data/corpus_text_document
#
# OPTIONS are tools/evaluate.py's, of which --tasks or --perplexity is needed to measure; without any the export
# alone is made. The measurements are OUTPUT/evaluation.json. An OUTPUT that is there is measured and not written.

#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail

# sbatch runs a copy of this file from a spool folder, in the folder it was submitted from.
if [[ ! -f ${MEGALITE_ROOT:-.}/slurm/start.sh ]]; then
    echo "error: slurm/start.sh is not in ${MEGALITE_ROOT:-$PWD}: submit from the root of the checkout, or with" \
        "sbatch --chdir=ROOT" >&2
    exit 2
fi
# shellcheck source=slurm/start.sh
source "${MEGALITE_ROOT:-.}/slurm/start.sh"
require_job

run_dir=${1:-} output=${2:-}
[[ -d $run_dir && -n $output && $output != -* ]] ||
    fail "RUN_DIR is '$run_dir' and OUTPUT '$output': slurm/export.sh RUN_DIR OUTPUT [OPTIONS OF evaluate.py]"

[[ -f $output/config.json ]] ||
    "$python" "${code}tools/convert_to_hf.py" --checkpoint "$run_dir" --output "$output" --verify
(($# == 2)) || "$python" "${code}tools/evaluate.py" --checkpoint "$output" --output "$output/evaluation.json" "${@:3}"
